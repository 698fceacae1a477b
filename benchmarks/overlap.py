"""What it gains that encoding, denoising and decoding have threads of their own.

Every forward of the transformer holds one picture, and torch has one thread; pictures that end together are
decoded together, as in a worker, which may gain beyond what is side by side. One request at a time
is one stage at a time; four at once have their stages side by side, as far as there are cores. What it could
gain at most without that is all stages' seconds by those of the longest.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.measure import Row, arguments, header, show
from benchmarks.ours import Ours
from pipelines import zoo
from pipelines.base import Assets
from pipelines.flux.flux_dev import Pipeline
from pipelines.flux.model import FluxModel
from schemas.endpoints.flux_dev import Input
from schemas.settings import ModelSettings
from tests.support.jobs import ENDPOINT

SIDE, PICTURES, REPEATS, AT_ONCE = 512, 16, 3, 4
TOKENS = (SIDE // 16) ** 2  # of one picture
SETTINGS = ModelSettings(model="zoo:flux", endpoints=(ENDPOINT,), max_sequence_length=32, batch_tokens=TOKENS)


def wish(seed: int, steps: int) -> Input:
    return Input.model_validate(
        {
            "prompt": f"a red circle, {seed}",
            "image_size": {"width": SIDE, "height": SIDE},
            "num_inference_steps": steps,
            "seed": seed,
        }
    )


@torch.inference_mode()
def stages(pipeline: Pipeline, steps: int) -> list[float]:
    """Seconds that a request encodes, denoises and decodes, alone on this thread."""
    times = [time.perf_counter()]
    [sample] = pipeline.prepare(wish(-1, steps), Assets(), 0).samples
    times.append(time.perf_counter())
    while not sample.is_done:
        [prediction] = pipeline.model.predict([sample])
        sample.accept(sample.plan.advance(sample.step, sample.latents, prediction, sample.denoised))
    times.append(time.perf_counter())
    pipeline.finish(sample)
    times.append(time.perf_counter())
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def rate(ours: Ours, steps: int, at_once: int, first: int) -> float:
    """Pictures a second. `first`: a seed, so that no text is encoded twice."""
    with ThreadPoolExecutor(at_once) as callers:
        began = time.perf_counter()
        list(callers.map(ours.draw, [wish(first + number, steps) for number in range(PICTURES)]))
        return PICTURES / (time.perf_counter() - began)


def compare(pipeline: Pipeline, ours: Ours, steps: int) -> Row:
    stages(pipeline, steps)  # warm-up
    took = stages(pipeline, steps)
    found: dict[int, list[float]] = {1: [], AT_ONCE: []}
    for repeat in range(REPEATS):
        for at_once, rates in found.items():
            rates.append(rate(ours, steps, at_once, 1000 * steps + 100 * repeat + 50 * (at_once == 1)))
    return {
        "steps": str(steps),
        "encode ms": 1e3 * took[0],
        "denoise ms": 1e3 * took[1],
        "decode ms": 1e3 * took[2],
        "one by one /s": found[1],
        f"{AT_ONCE} at once /s": found[AT_ONCE],
        "ratio": [many / one for one, many in zip(found[1], found[AT_ONCE], strict=True)],
        "at most": sum(took) / max(took),
    }


def main() -> None:
    options = arguments("Stages side by side.")
    torch.set_num_threads(1)
    pipeline = Pipeline(FluxModel.load(SETTINGS, lambda _: zoo.locate("flux")))
    ours = Ours(pipeline, TOKENS)
    rows = [compare(pipeline, ours, steps) for steps in (2, 4, 8, 16)]
    ours.close()
    show(
        f"overlap: {SIDE} × {SIDE}, one picture a forward, {PICTURES} pictures a measurement",
        rows,
        f"median (range) of {REPEATS} interleaved repeats; each text is new",
        options.json,
    )


if __name__ == "__main__":
    header()
    main()
