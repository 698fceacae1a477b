"""Requests as they come, drawn from seeds: the same each time."""

import math
import random
from collections.abc import Callable, Iterator

from benchmarks.simulation import Request

HOUR_S = 3600.0
WORK_S = 3.4  # FLUX.1-dev at 1024², 28 steps, on the card that we aim at


def arrivals(rate: Callable[[float], float], most: float, seconds: float, seed: int) -> Iterator[float]:
    """A Poisson process of `rate(at)` a second, which is at most `most`: thinned."""
    draw = random.Random(seed)
    at = 0.0
    while (at := at + draw.expovariate(most)) < seconds:
        if draw.random() * most < rate(at):
            yield at


def steady(per_s: float = 0.8, seconds: float = HOUR_S, seed: int = 1) -> list[Request]:
    return [Request(at, WORK_S) for at in arrivals(lambda at: per_s, per_s, seconds, seed)]


def burst(
    per_s: float = 0.1, crowd: int = 200, seconds: float = HOUR_S, every_s: float = 1200.0, seed: int = 2
) -> list[Request]:
    """Few, and `crowd` more within ten seconds, ever again."""
    draw = random.Random(seed)
    crowds = [
        at + draw.uniform(0, 10) for at in _multiples(every_s, seconds, every_s / 2) for _ in range(crowd)
    ]
    few = arrivals(lambda at: per_s, per_s, seconds, seed)
    return [Request(at, WORK_S) for at in sorted([*few, *crowds])]


def diurnal(most: float = 2.0, day_s: float = 4 * HOUR_S, seed: int = 3) -> list[Request]:
    """From a hundredth of `most` to `most` and back, in a day of four hours."""

    def rate(at: float) -> float:
        return most * (0.01 + 0.99 * math.sin(math.pi * at / day_s) ** 2)

    return [Request(at, WORK_S) for at in arrivals(rate, most, day_s, seed)]


def mixed(per_s: float = 0.8, seconds: float = HOUR_S, seed: int = 4) -> list[Request]:
    """Small pictures, usual ones and long ones, of half a second to twenty."""
    draw = random.Random(seed)
    sizes, shares = (0.5, WORK_S, 20.0), (60, 30, 10)
    return [
        Request(at, draw.choices(sizes, shares)[0]) for at in arrivals(lambda at: per_s, per_s, seconds, seed)
    ]


def quick(per_s: float = 0.5, crowd: int = 2000, seconds: float = HOUR_S, seed: int = 6) -> list[Request]:
    """Half a second each, and once very many: the queue is long, the work is not as much."""
    draw = random.Random(seed)
    crowds = [seconds / 4 + draw.uniform(0, 10) for _ in range(crowd)]
    few = arrivals(lambda at: per_s, per_s, seconds, seed)
    return [Request(at, 0.5) for at in sorted([*few, *crowds])]


def zipf(
    per_s: float = 0.8,
    seconds: float = HOUR_S,
    adapters: int = 200,
    exponent: float = 1.0,
    work_s: float = WORK_S,
    seed: int = 5,
) -> list[Request]:
    """Each names an adapter; the n-th most loved is named 1/n^exponent as often as the first."""
    draw = random.Random(seed)
    names = [f"lora-{number}" for number in range(adapters)]
    loved = [1 / (number + 1) ** exponent for number in range(adapters)]
    return [
        Request(at, work_s, draw.choices(names, loved)[0])
        for at in arrivals(lambda at: per_s, per_s, seconds, seed)
    ]


def _multiples(step: float, end: float, first: float) -> Iterator[float]:
    while first < end:
        yield first
        first += step
