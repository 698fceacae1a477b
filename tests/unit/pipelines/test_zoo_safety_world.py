"""The trained stand-in for a safety checker flags crosses, which no caption has, and little else."""

import numpy as np
from PIL import Image

from pipelines import zoo
from pipelines.safety import SafetyChecker
from pipelines.zoo import world


def test_crosses_are_flagged_and_what_the_models_draw_is_not() -> None:
    checker = SafetyChecker.load(zoo.locate("world-safety-checker"), "cpu")
    rng = np.random.default_rng(1)
    crosses, others = (
        [Image.fromarray(world.draw(world.scene(rng, **shape))) for _ in range(60)]
        for shape in ({"shape": world.UNSAFE}, {})
    )

    assert sum(checker.flags(crosses)) >= 56
    assert sum(checker.flags(others)) <= 3
    assert not any(checker.flags([Image.new("RGB", (64, 64), colour) for colour in ("white", "black")]))
