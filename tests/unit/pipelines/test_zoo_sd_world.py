"""The trained embedded Stable Diffusion models do what requests say: judged from pixels over seeds, with a
binomial margin.

`python -m benchmarks.zoo` prints the same figures over 200 seeds.
"""

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest

from pipelines import zoo
from pipelines.zoo import judges
from tests.support import sd_world
from tests.support.sd_world import Kind
from tests.support.world import asked, distances, prompts, scenes

KINDS = get_args(Kind)
pytestmark = pytest.mark.skipif(
    not {"sd15-world", "sdxl-world", "sdxl-world-canny"} <= {*zoo.trained()},
    reason="these models are not shipped yet: darkroom zoo build",
)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_show_what_was_asked(kind: Kind) -> None:
    wanted = asked(40, seed=1)
    seen = judges.agreement(sd_world.drawn(kind, prompts(wanted), 1000), wanted)

    assert seen["background"] >= 0.88
    assert seen["colour"] >= 0.80
    assert seen["position"] >= 0.60
    assert seen["shape"] >= 0.60


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_raises_agreement(kind: Kind) -> None:
    wanted = asked(32, seed=2)
    weak, strong = (
        judges.agreement(sd_world.drawn(kind, prompts(wanted), 2000, guidance_scale=scale), wanted)
        for scale in (1, 5)
    )

    assert sum(strong.values()) >= sum(weak.values())


def test_strength_trades_the_input_for_the_prompt() -> None:
    wanted, starts = asked(16, seed=3), scenes(16, seed=4)
    far, right = [], []
    for strength in (0.2, 0.5, 0.8, 1.0):
        made = sd_world.remade("sd15", prompts(wanted), starts, 3000, noise_strength=strength)
        far.append(float(np.mean(distances(made, starts))))
        right.append(sum(judges.agreement(made, wanted).values()))

    assert far == sorted(far)
    assert right[-1] > right[0] + 1
    assert all(later >= earlier - 0.3 for earlier, later in pairwise(right))


def test_the_controlnet_follows_edges() -> None:
    wanted, pictures = asked(24, seed=5), scenes(24, seed=6)
    said = [f"a {each['colour']} shape on a {each['background']} background" for each in wanted]
    followed, free = (
        np.mean(
            [
                judges.edge_iou(one, other)
                for one, other in zip(
                    sd_world.along_edges(said, pictures, 4000, controlnet_conditioning_scale=scale),
                    pictures,
                    strict=True,
                )
            ]
        )
        for scale in (1, 0)
    )

    assert followed >= 2 * free
