"""How many replicas, on several nodes: our policy beside Serve's own, and the same trace simulated."""

import copy
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks import traces
from benchmarks.measure import Row, arguments, header, percentile, show
from benchmarks.policies import ByRequests, ByWork
from benchmarks.scaling import outcome
from benchmarks.simulation import Physics, Request, Scaler
from deployments.scaling import Rules
from tests.support.postgres import postgres_at_work
from tests.support.ray_cluster import LIMIT_S, LONG, NODES, RayCluster, end, ray_cluster, serve, until, wake
from tests.support.watching import submit

SECONDS, LOAD, CALLERS, LOOK_S = 180.0, 1.2, 64, 1.0  # LOAD: in replicas
RULES = Rules(least=1, most=2, target_wait_s=3.0, low_target_wait_s=120.0, hold_s=10.0, idle_s=600.0)
POLICIES = {"ours": "work", "Serve's": "requests"}
CAPTION = (
    f"1 to 2 replicas on nodes of their own; for {SECONDS:.0f} s requests of 50 steps at 512 × 512 at random "
    f"times, work for {LOAD} replicas; both policies let go after {RULES.hold_s:.0f} s. Both replicas share "
    "this machine's cores, and rows gain from batches, which the simulation knows nothing of: compare the "
    "policies, not the sources."
)


@dataclass
class Watched:
    """What there was of replicas, looked at every second until stopped."""

    cluster: RayCluster
    replica_s: float = 0.0
    counts: list[int] = field(default_factory=list)  # wanted, when it changed
    _stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(LOOK_S):
            wanted, there = self.cluster.wanted("flux"), len(self.cluster.replicas("flux", "worker"))
            self.replica_s += max(wanted, there) * (time.monotonic() - looked)
            looked = time.monotonic()
            if self.counts[-1:] != [wanted]:
                self.counts.append(wanted)

    def stop(self) -> None:
        self._stopped.set()


def settled(config: dict[str, Any], policy: str, start_s: float) -> dict[str, Any]:
    """FLUX under a policy."""
    changed = copy.deepcopy(config)
    [flux] = [each["args"] for each in changed["applications"] if each["name"] == "flux"]
    flux |= {
        "min_replicas": RULES.least,
        "max_replicas": RULES.most,
        "autoscaling": {
            "policy": policy,
            "target_wait_s": RULES.target_wait_s,
            "hold_s": RULES.hold_s,
            "idle_s": RULES.idle_s,
            "start_s": start_s,
        },
    }
    return changed


def started_s(cluster: RayCluster, http: httpx.Client) -> float:
    """Until a sleeping replica runs, a picture included."""
    until(lambda: cluster.places("flux") == [])
    began = time.monotonic()
    wake(cluster, http)
    return time.monotonic() - began


def alone_s(http: httpx.Client) -> float:
    """What a request takes by itself."""
    began = time.monotonic()
    end(http, submit(http, LONG))
    return time.monotonic() - began


def play(cluster: RayCluster, trace: Sequence[Request]) -> tuple[list[float], Watched]:
    """Each request at its time. Returns the seconds beyond their own that they took."""
    watched = Watched(cluster)
    watching = threading.Thread(target=watched.run)
    watching.start()
    began = time.monotonic()

    def call(request: Request) -> float:
        time.sleep(max(0.0, began + request.at - time.monotonic()))
        with httpx.Client(base_url=cluster.url("front"), timeout=LIMIT_S) as http:
            end(http, submit(http, LONG))
        return max(0.0, time.monotonic() - began - request.at - request.work_s)

    with ThreadPoolExecutor(CALLERS) as pool:
        waits = list(pool.map(call, trace))
    watched.stop()
    watching.join()
    return waits, watched


def row(where: str, policy: str, waits: Sequence[float], replica_s: float, changes: int) -> Row:
    return {
        "where": where,
        "policy": policy,
        "requests": str(len(waits)),
        "wait p50 s": percentile(waits, 50),
        "wait p95 s": percentile(waits, 95),
        "replica-seconds": replica_s,
        "changes": str(changes),
    }


def simulated(trace: Sequence[Request], start_s: float, slots: int) -> list[Row]:
    physics = Physics(slots=slots, start_s=start_s)
    window = slots * RULES.most + 2
    scalers: dict[str, Scaler] = {"ours": ByWork(RULES, start_s), "Serve's": ByRequests(RULES, slots, window)}
    rows = []
    for name, scaler in scalers.items():
        done = outcome(scaler, RULES, trace, physics)
        rows.append(row("simulated", name, done.waits, done.replica_s, len(done.counts) - 1))
    return rows


def main() -> None:
    options = arguments(__doc__ or "")
    rows: list[Row] = []
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_at_work())
        cluster = stack.enter_context(ray_cluster((*NODES, "gpu-80gb/2")))
        serve(cluster, postgres.new_database())
        http = stack.enter_context(httpx.Client(base_url=cluster.url("front"), timeout=LIMIT_S))
        start_s = started_s(cluster, http)
        work_s = alone_s(http)
        [flux] = [each["args"] for each in cluster.config["applications"] if each["name"] == "flux"]
        trace = [Request(each.at, work_s) for each in traces.steady(LOAD / work_s, SECONDS)]
        for name, policy in POLICIES.items():
            cluster.deploy(settled(cluster.config, policy, start_s))
            until(cluster.are_running)
            wake(cluster, http)
            waits, watched = play(cluster, trace)
            rows.append(row("nodes", name, waits, watched.replica_s, len(watched.counts) - 1))
        rows += simulated(trace, start_s, flux["concurrency"])
    caption = f"{CAPTION} A start took {start_s:.1f} s, a request alone {work_s:.2f} s."
    show("Autoscaling on nodes and simulated", rows, caption, options.json)


if __name__ == "__main__":
    header()
    main()
