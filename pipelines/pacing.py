"""Measures a model's pace when it starts: pictures of a few sizes, each alone and in growing company."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

from pipelines.base import AnyPipeline, Assets, Generation
from pipelines.engine.engine import Predict
from pipelines.engine.memory import give_back, ran_out
from pipelines.engine.pace import WORTH, Curve, Pace
from pipelines.engine.sample import Sample
from schemas.assets import AssetKind, assets
from schemas.errors import Location
from schemas.settings import ModelSettings

logger = logging.getLogger(__name__)

SIDES_PX = (256, 512, 1024)  # the smallest first: it says how long the others will take
LIMIT_S = 8.0
PICTURE = "https://probe.invalid/picture.png"  # stands for a picture that is given with it
REPEATS = 2  # of a forward, after one that is not counted; the quickest counts


@contextmanager
def probes(
    pipeline: AnyPipeline, schema: ModuleType, settings: ModelSettings, sides: Sequence[int] = SIDES_PX
) -> Iterator[list[Sample]]:
    """A sample before its first step for each size that is allowed, of the example in a schema."""
    generations = [
        _prepared(pipeline, schema, settings.model, side)
        for side in sides
        if side * side <= settings.limits.max_pixels
    ]
    try:
        yield [generation.samples[0] for generation in generations if not generation.samples[0].is_done]
    finally:
        for generation in generations:
            generation.resources.close()


def measured(
    predict: Predict,
    samples: Sequence[Sample],
    budget: int,
    limit_s: float = LIMIT_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Pace:
    """The pace of forwards of each sample with copies of itself, within `budget` image tokens.

    It takes no longer than `limit_s`, as far as the last forward tells: what was not measured by then is
    taken to be like the rest. No sample is changed.
    """
    deadline = clock() + limit_s
    pace = Pace()
    with torch.inference_mode():
        for sample in samples:
            likely = pace.work(sample.cost, sample.cost) if pace.curves else 0.0
            curve = _curve(predict, sample, budget, deadline, clock, likely)
            if curve.seconds:
                pace = Pace((*pace.curves, curve))
    return pace


def _curve(
    predict: Predict,
    sample: Sample,
    budget: int,
    deadline: float,
    clock: Callable[[], float],
    likely: float,
) -> Curve:
    """`likely`: seconds that the first forward will take."""
    seconds: dict[int, float] = {}
    rows = 1
    while rows == 1 or rows * sample.cost <= budget:
        if clock() + (1 + REPEATS) * likely > deadline:
            break
        took = _took(predict, [sample] * rows, clock)
        if took is None:
            break
        seconds[rows], likely = took, 2 * took
        if rows > 1 and took > 2 * seconds[rows // 2] * (1 - WORTH):
            break
        rows *= 2
    return Curve(sample.cost, seconds)


def _took(predict: Predict, samples: Sequence[Sample], clock: Callable[[], float]) -> float | None:
    """Seconds of a forward; None where there is not the memory for it."""
    times = []
    try:
        for _ in range(1 + REPEATS):
            began = clock()
            predict(samples)[-1].flatten()[:1].tolist()  # waits for the device
            times.append(clock() - began)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        logger.info("%d rows of %d tokens do not fit: %s", len(samples), samples[0].cost, str(error))
    if len(times) <= REPEATS:
        give_back()
        return None
    return min(times[1:])


def _prepared(pipeline: AnyPipeline, schema: ModuleType, model: str, side: int) -> Generation:
    size = {"width": side, "height": side}
    wishes = {"image_url": PICTURE, "image_size": size, "num_inference_steps": 4, "num_images": 1}
    known = {name: value for name, value in wishes.items() if name in schema.Input.model_fields}
    request = schema.Input.model_validate(schema.EXAMPLE | known)
    named = [(ref.loc, ref.asset.kind) for ref in assets(request)]
    pictures: dict[Location, Image.Image] = {
        loc: Image.new("RGB", (side, side), "gray") for loc, kind in named if kind is AssetKind.IMAGE
    }
    paths = {loc: Path(model) for loc, kind in named if kind is AssetKind.BASE}
    found = Assets(pictures, paths)
    with pipeline.hold(request, found):
        return pipeline.prepare(request, found, 0)
