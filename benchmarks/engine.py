"""Pictures per second of our engine, which batches, beside diffusers' own pipeline behind a lock.

The same weights, sizes, steps, seeds and threads; both go from a prompt to a picture. Their latents and
pictures of one seed are compared before anything is timed.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import torch
from PIL.Image import Image as Picture

from benchmarks.measure import Row, arguments, header, show
from benchmarks.ours import Ours
from benchmarks.stock import TEXT_TOKENS, Stock
from pipelines import zoo
from pipelines.flux.flux_dev import Pipeline
from pipelines.flux.model import FluxModel
from schemas.endpoints.flux_dev import Input
from schemas.settings import ModelSettings
from tests.support.jobs import ENDPOINT

REPEATS, STEPS, TOLERANCE = 3, 8, 1e-3
PICTURES = {64: 48, 512: 12}  # side in pixels → pictures a measurement
SETTINGS = ModelSettings(model="zoo:flux", endpoints=(ENDPOINT,), max_sequence_length=TEXT_TOKENS)
Draw = Callable[[Input], Picture]


def wish(side: int, seed: int) -> Input:
    return Input.model_validate(
        {
            "prompt": "a lighthouse",
            "image_size": {"width": side, "height": side},
            "num_inference_steps": STEPS,
            "seed": seed,
        }
    )


class Plain:
    """One call after the other, whoever calls."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._lock = Lock()
        self.latents = stock.latents

    def draw(self, request: Input) -> Picture:
        with self._lock:
            return self._stock.draw([request])[0]


def difference(ours: Ours, plain: Plain, side: int) -> float:
    """The largest between the latents of one seed. Pictures may differ by one rounding."""
    request = wish(side, 7)
    pictures = [np.asarray(each.draw(request)).astype(int) for each in (ours, plain)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1, "the pictures differ"
    return float((ours.sample(request).latents - plain.latents(request)).abs().max())


def rates(draw: Draw, side: int, callers: ThreadPoolExecutor) -> tuple[float, float]:
    """Pictures a wall second and a CPU second."""
    requests = [wish(side, seed) for seed in range(PICTURES[side])]
    wall, cpu = time.perf_counter(), time.process_time()
    list(callers.map(draw, requests))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return len(requests) / wall, len(requests) / cpu


def compare(ours: Ours, plain: Plain, side: int, concurrent: int) -> Row:
    ways: dict[str, Draw] = {"ours": ours.draw, "plain": plain.draw}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with ThreadPoolExecutor(concurrent) as callers:
        for draw in ways.values():
            list(callers.map(draw, [wish(side, 0)] * concurrent))  # warm-up
        for _ in range(REPEATS):
            for name, draw in ways.items():
                found[name].append(rates(draw, side, callers))
    (wall, cpu), (plain_wall, plain_cpu) = (zip(*found[name], strict=True) for name in ways)
    return {
        "size": f"{side} px",
        "threads": float(torch.get_num_threads()),
        "at once": float(concurrent),
        "ours /s": list(wall),
        "plain /s": list(plain_wall),
        "ratio": [a / b for a, b in zip(wall, plain_wall, strict=True)],
        "ours /CPU-s": list(cpu),
        "plain /CPU-s": list(plain_cpu),
        "CPU ratio": [a / b for a, b in zip(cpu, plain_cpu, strict=True)],
    }


def main() -> None:
    options = arguments("The engine beside a plain diffusers pipeline.")
    model = FluxModel.load(SETTINGS, lambda _: zoo.locate("flux"))
    plain, rows, worst = Plain(Stock()), [], 0.0
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ours = Ours(Pipeline(model), SETTINGS.batch_tokens)
        worst = max(worst, *(difference(ours, plain, side) for side in PICTURES))
        assert worst <= TOLERANCE, f"latents differ by {worst}"
        rows += [compare(ours, plain, side, concurrent) for side in PICTURES for concurrent in (1, 4, 8, 16)]
    show(
        f"engine: pictures a second, {STEPS} steps, ours beside a diffusers pipeline behind a lock",
        rows,
        f"median (range) of {REPEATS} interleaved repeats. Checked before: latents of one seed differ by "
        f"at most {worst:.1g}, pictures by at most 1 of 255",
        options.json,
    )


if __name__ == "__main__":
    header()
    main()
