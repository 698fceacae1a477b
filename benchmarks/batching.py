"""A mix of pictures on one device in simulated time: our batcher beside first come, first served.

The batcher is the shipped one; the device is a curve of seconds by rows, put together from published figures
for models of FLUX's class on H200s, not measured by us: at 1024 × 1024 rows gain nothing, at 512 × 512 up to
four do. Pure and exact: no forward runs, and the same seed gives the same figures.
"""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.measure import Row, arguments, header, percentile, show
from pipelines.engine.batcher import Batcher
from pipelines.engine.pace import Curve, Pace
from pipelines.engine.sample import Advanced, Plan, Sample
from schemas.jobs import Priority
from tests.support.engine import NOTHING

BUDGET = 16_384  # image tokens that a forward may hold
# seconds a step: about FLUX's of good servers at one row; the gain of rows is that published for Qwen-Image
H200 = Pace(
    (
        Curve(1024, {1: 0.036, 2: 0.040, 4: 0.052, 8: 0.092}),
        Curve(4096, {1: 0.120, 2: 0.234, 4: 0.465}),
    )
)


@dataclass(frozen=True, slots=True)
class Wish:
    """A picture: when it comes, what it takes."""

    at: float
    steps: int
    cost: int = 4096
    priority: Priority = Priority.NORMAL


class Steps(Plan):
    """So many steps of one shape, which compute nothing."""

    def __init__(self, steps: int, cost: int) -> None:
        self.steps, self._cost = steps, cost

    def key(self, step: int) -> Hashable:
        return self._cost

    def cost(self, step: int) -> int:
        return self._cost

    def advance(self, step: int, latents: Tensor, prediction: Tensor, previous: Tensor | None) -> Advanced:
        raise AssertionError("nothing is computed")


Choose = Callable[[Sequence[Sample], int], Sequence[Sample]]


class Policy:
    """First come, first served, one at a time: a lock around a pipeline."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def admit(self, sample: Sample, priority: Priority) -> None:
        """A sample comes."""

    def choose(self, samples: Sequence[Sample], budget: int) -> Sequence[Sample]:
        return samples[:1]


class Together(Policy):
    """First come, first served, with whoever has the same shape and fits."""

    def choose(self, samples: Sequence[Sample], budget: int) -> Sequence[Sample]:
        alike = [sample for sample in samples if sample.key == samples[0].key]
        return alike[: max(1, budget // samples[0].cost)]


class InTurn(Policy):
    """Whoever waited longest for a step, with whoever has the same shape and fits."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(pace)
        self._turns: dict[Sample, int] = {}
        self._turn = 0

    def choose(self, samples: Sequence[Sample], budget: int) -> Sequence[Sample]:
        waiting = sorted(samples, key=lambda sample: self._turns.get(sample, -1))
        alike = [sample for sample in waiting if sample.key == waiting[0].key]
        batch = alike[: max(1, budget // waiting[0].cost)]
        self._turn += 1
        self._turns |= dict.fromkeys(batch, self._turn)
        return batch


class Ours(Policy):
    """The batcher that is shipped."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(pace)
        self._batcher = Batcher(pace)
        self.admit, self.choose = self._batcher.admit, self._batcher.choose  # type: ignore[method-assign]


@dataclass
class Played:
    """What came of a trace."""

    ends: dict[Wish, float] = field(default_factory=dict)
    busy_s: float = 0.0
    turns: list[tuple[float, tuple[Wish, ...]]] = field(default_factory=list)  # when each began, its rows

    def latencies(self, priority: Priority, cost: int | None = None) -> list[float]:
        """Seconds from the coming to the last step."""
        return [
            end - wish.at
            for wish, end in self.ends.items()
            if wish.priority == priority and cost in (None, wish.cost)
        ]


def play(wishes: Sequence[Wish], policy: Policy, budget: int = BUDGET) -> Played:
    """Run a trace to its end. Wishes that are equal in all are one."""
    coming, active = sorted(wishes, key=lambda wish: wish.at), dict[Sample, Wish]()
    now, played = 0.0, Played()
    while coming or active:
        now = max(now, coming[0].at) if not active else now
        while coming and coming[0].at <= now:
            wish = coming.pop(0)
            sample = Sample("", Steps(wish.steps, wish.cost), NOTHING)
            policy.admit(sample, wish.priority)
            active[sample] = wish
        batch = policy.choose(list(active), budget)
        played.turns.append((now, tuple(active[sample] for sample in batch)))
        took = policy.pace.work(batch[0].cost, sum(sample.cost for sample in batch))
        now, played.busy_s = now + took, played.busy_s + took
        for sample in batch:
            sample.step += 1
            if sample.is_done:
                played.ends[active.pop(sample)] = now
    return played


def mixed(seed: int, seconds: float, load: float) -> list[Wish]:
    """Long ones of low priority, 50 steps of 1024², and quick ones of normal, 4 steps of it or 28 of 512²."""
    chance = random.Random(seed)
    kinds = (
        (Priority.LOW, 50, 4096, 0.5),  # and their shares of the work
        (Priority.NORMAL, 4, 4096, 0.2),
        (Priority.NORMAL, 28, 1024, 0.3),
    )
    wishes = []
    for priority, steps, cost, share in kinds:
        at, rate = 0.0, load * share / (steps * H200.work(cost, cost))
        while (at := at + chance.expovariate(rate)) < seconds:
            wishes.append(Wish(at, steps, cost, priority))
    return wishes


POLICIES: dict[str, type[Policy]] = {
    "ours": Ours,
    "first come, alike together": Together,
    "in turn, alike together": InTurn,
    "first come, one by one": Policy,
}


def compare(load: float, name: str) -> Row:
    played = [play(mixed(seed, 600, load), POLICIES[name](H200)) for seed in range(3)]

    def seconds(figure: Callable[[list[float]], float], priority: Priority, cost: int) -> list[float]:
        return [figure(each.latencies(priority, cost)) for each in played]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def late(values: list[float]) -> float:
        return percentile(values, 95)

    return {
        "load": f"{load:.0%}",
        "who goes first": name,
        "4 steps, mean s": seconds(mean, Priority.NORMAL, 4096),
        "p95": seconds(late, Priority.NORMAL, 4096),
        "512², mean s": seconds(mean, Priority.NORMAL, 1024),
        "p95 ": seconds(late, Priority.NORMAL, 1024),
        "50 steps, low, mean s": seconds(mean, Priority.LOW, 4096),
        "p95  ": seconds(late, Priority.LOW, 4096),
        "GPU-s": [each.busy_s for each in played],
    }


def main() -> None:
    options = arguments("Who goes first on one device, in simulated time.")
    rows = [compare(load, name) for load in (0.5, 0.8, 0.95) for name in POLICIES]
    show(
        "batching: ten minutes of mixed pictures and priorities on one simulated device",
        rows,
        "seconds from coming to the last step, median (range) of 3 seeds; the load is what the pictures take "
        "one by one. No GPU was used: the device is a curve",
        options.json,
    )


if __name__ == "__main__":
    header()
    main()
