"""Which replica gets a request that names an adapter: ours beside Serve's own routers, in simulated time.

Four replicas, adapters named as Zipf's law has it. A fetch brings an adapter to a replica that never had
it, a load brings one back into its memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks import traces
from benchmarks.measure import Row, arguments, header, percentile, show
from benchmarks.policies import Affinity, Fixed, Multiplexed, PowerOfTwo
from benchmarks.simulation import Outcome, Physics, Request, Router, run

REPLICAS = 4
PHYSICS = Physics(start_s=0.0)
CAPTION = (
    "4 replicas of 8 places, room for 8 adapters each; a fetch takes 2 s, a load 0.2 s. wait: seconds beyond "
    "the request's own compute seconds. balance: the busiest replica's work by the mean. copies: who "
    "has the most loved adapter."
)


def loads() -> dict[str, tuple[float, Sequence[Request]]]:
    """By name: the compute seconds of a request, and the requests of an hour."""
    return {
        "200 adapters, 3.4 s each": (3.4, traces.zipf(0.88)),
        "50 adapters, 3.4 s each": (3.4, traces.zipf(0.88, adapters=50)),
        "200 adapters, 0.5 s each": (0.5, traces.zipf(6.0, work_s=0.5)),
    }


def routers(seconds: float) -> dict[str, tuple[Callable[[], Router], Physics]]:
    one_by_one = replace(PHYSICS, loads_one_by_one=True)
    return {
        "ours": (lambda: Affinity(seconds), PHYSICS),
        "power of two choices": (PowerOfTwo, PHYSICS),
        "@serve.multiplexed": (Multiplexed, one_by_one),
    }


def outcome(router: Router, physics: Physics, trace: Sequence[Request]) -> Outcome:
    return run(trace, physics, router, Fixed(REPLICAS), replicas=REPLICAS)


def balance(done: Outcome) -> float:
    """The busiest replica's work by the mean."""
    work = [each.done_s for each in done.replicas]
    return max(work) * len(work) / sum(work)


def copies(done: Outcome, adapter: str = "lora-0") -> int:
    return sum(adapter in each.disk for each in done.replicas)


def _row(load: str, router: str, done: Outcome) -> Row:
    return {
        "requests": load,
        "router": router,
        "fetches": float(sum(each.fetches for each in done.replicas)),
        "loads": float(sum(each.loads for each in done.replicas)),
        "wait p50 s": percentile(done.waits, 50),
        "wait p95 s": percentile(done.waits, 95),
        "balance": balance(done),
        "copies": float(copies(done)),
    }


def main() -> None:
    options = arguments(__doc__ or "")
    rows = [
        _row(load, name, outcome(make(), physics, trace))
        for load, (seconds, trace) in loads().items()
        for name, (make, physics) in routers(seconds).items()
    ]
    show("Routing by adapters, simulated", rows, CAPTION, options.json)


if __name__ == "__main__":
    header()
    main()
