"""The trained embedded models at work: requests for pictures of the world, and what the pictures show."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines import zoo
from pipelines.engine.engine import Engine
from pipelines.zoo import judges, world
from pipelines.zoo.world import Pixels
from schemas.fields import EndpointInput
from tests.support.assets import given
from tests.support.engine import run_to_end

SIZE = {"width": world.SIDE_PX, "height": world.SIDE_PX}
START = "http://pictures/start.png"
Asked = Mapping[str, str]


def folder(source: str) -> Path:
    return zoo.locate(source.removeprefix("zoo:"))


def asked(count: int, seed: int, **fixed: str) -> list[dict[str, str]]:
    """What pictures shall show: all attributes, drawn at random but for what is `fixed`."""
    rng = np.random.default_rng(seed)
    return [
        {name: str(rng.choice(values)) for name, values in world.ATTRIBUTES.items()} | fixed
        for _ in range(count)
    ]


def prompts(each: Iterable[Asked]) -> list[str]:
    return [world.prompt(**one) for one in each]


def scene(one: Asked, seed: int) -> world.Scene:
    """A scene as asked."""
    return world.scene(np.random.default_rng(seed), **one)


def scenes(count: int, seed: int, **fixed: str) -> list[Pixels]:
    """True drawings, at random but for what is `fixed`."""
    return [world.draw(scene(each, seed + index)) for index, each in enumerate(asked(count, seed, **fixed))]


def draw(pipeline: Any, wishes: Sequence[EndpointInput], *files: Mapping[str, Any]) -> list[Pixels]:
    """The first picture of each request, all through one engine. `files[i]` are what request i names."""
    named = files or ({},) * len(wishes)
    generations = [
        pipeline.prepare(wish, given(wish, dict(each)), 0) for wish, each in zip(wishes, named, strict=True)
    ]
    samples = [generation.samples[0] for generation in generations]
    ears = run_to_end(Engine(pipeline.model.predict, 1 << 12), samples)
    for error in filter(None, ears.ends.values()):
        raise error
    pictures = [np.asarray(pipeline.finish(sample)) for sample in samples]
    for generation in generations:
        generation.resources.close()
    return pictures


def started(pictures: Iterable[Pixels], **more: Any) -> list[dict[str, Any]]:
    """Files for `draw`: each picture as START, and what else all requests name."""
    return [{START: Image.fromarray(each)} | more for each in pictures]


def edge_iou(pictures: Sequence[Pixels], others: Sequence[Pixels]) -> float:
    """How far the outlines of the pairs agree on average, 0 … 1."""
    ious = [judges.edge_iou(one, other) for one, other in zip(pictures, others, strict=True)]
    return float(np.mean(ious))


def distances(pictures: Sequence[Pixels], others: Sequence[Pixels]) -> list[float]:
    """The mean distance per channel of each pair, of 255."""
    return [
        float(np.abs(one.astype(float) - other).mean()) for one, other in zip(pictures, others, strict=True)
    ]
