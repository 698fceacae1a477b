"""How many replicas: our policy beside Serve's own, in simulated time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks import traces
from benchmarks.measure import Row, arguments, header, percentile, show
from benchmarks.policies import Affinity, ByRequests, ByWork
from benchmarks.simulation import Outcome, Physics, Request, Scaler, run
from deployments.scaling import Rules

PHYSICS = Physics(start_s=60.0)
RULES = Rules(least=1, most=8, target_wait_s=10.0, low_target_wait_s=120.0, hold_s=120.0, idle_s=600.0)
WINDOW = PHYSICS.slots * RULES.most + 2  # what the dispatcher hands over at once
CAPTION = (
    "1 to 8 replicas (rare: 0 to 8) of 8 places, 60 s to start one; 3.4 compute seconds a request "
    "(many quick: 0.5, mixed sizes: 0.5 to 20). wait: seconds beyond those. Serve's own at 8 requests a "
    "replica, its places, and at 3, what a target of 10 s would be; all let go after 120 s where nothing is "
    "said. starts: of replicas; changes: of their number."
)


def loads() -> dict[str, tuple[Rules, Sequence[Request]]]:
    to_zero = replace(RULES, least=0)
    return {
        "steady": (RULES, traces.steady()),
        "burst": (RULES, traces.burst()),
        "diurnal": (RULES, traces.diurnal()),
        "LoRA Zipf": (RULES, traces.zipf()),
        "mixed sizes": (RULES, traces.mixed()),
        "many quick": (RULES, traces.quick()),
        "rare": (to_zero, traces.burst(per_s=0.0005, crowd=3, seconds=8 * traces.HOUR_S, every_s=3600.0)),
    }


def scalers(rules: Rules) -> dict[str, Callable[[], Scaler]]:
    return {
        "ours": lambda: ByWork(rules, PHYSICS.start_s),
        "ours, seeing the window only": lambda: ByWork(rules, PHYSICS.start_s, WINDOW),
        "Serve's, 8 a replica": lambda: ByRequests(rules, PHYSICS.slots, WINDOW),
        "Serve's, 8, kept for 600 s": lambda: ByRequests(replace(rules, hold_s=600.0), PHYSICS.slots, WINDOW),
        "Serve's, 3 a replica": lambda: ByRequests(rules, 3, WINDOW),
    }


def outcome(scaler: Scaler, rules: Rules, trace: Sequence[Request], physics: Physics = PHYSICS) -> Outcome:
    return run(trace, physics, Affinity(), scaler, replicas=rules.least)


def _row(load: str, policy: str, done: Outcome) -> Row:
    return {
        "requests": load,
        "policy": policy,
        "wait p50 s": percentile(done.waits, 50),
        "wait p95 s": percentile(done.waits, 95),
        "GPU-seconds": done.replica_s,
        "starts": float(done.starts),
        "changes": float(len(done.counts) - 1),
    }


def main() -> None:
    options = arguments(__doc__ or "")
    rows = [
        _row(load, name, outcome(make(), rules, trace))
        for load, (rules, trace) in loads().items()
        for name, make in scalers(rules).items()
    ]
    show("Autoscaling, simulated", rows, CAPTION, options.json)


if __name__ == "__main__":
    header()
    main()
