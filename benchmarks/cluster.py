"""Several nodes: how soon models are placed, replicas added, a lost node made up for; a rolling upgrade."""

import time
from contextlib import ExitStack

import httpx

from benchmarks.measure import Row, arguments, header, show
from tests.support.callers import Callers, calling
from tests.support.postgres import postgres_at_work
from tests.support.ray_cluster import (
    EACH,
    LIMIT_S,
    LONG,
    NODES,
    SHORT,
    RayCluster,
    end,
    ray_cluster,
    serve,
    until,
    upgraded,
    wake,
)
from tests.support.watching import follow, submit

CLIENTS = 2
CAPTION = (
    "Four nodes on this machine (head, front, two types of GPU that are numbers only), production's "
    "configuration with the embedded models on the CPU: what loading real weights takes comes on top. Failed "
    f"calls and the longest time between two answers are those of {CLIENTS} clients that submit, look every "
    "0.1 s, and fetch."
)


def row(what: str, seconds: float, callers: Callers | None = None) -> Row:
    seen = (str(len(callers.faults)), f"{callers.longest_gap_s:.2f}") if callers else ("", "")
    return {"what": what, "seconds": seconds, "failed calls": seen[0], "longest gap s": seen[1]}


def placement(cluster: RayCluster, http: httpx.Client) -> list[Row]:
    began = time.monotonic()
    receipts = {name: submit(http, document, endpoint) for name, (endpoint, document) in EACH.items()}
    rows = []
    for name, receipt in receipts.items():
        end(http, receipt)
        took = time.monotonic() - began
        rows.append(row(f"three sleeping models asked at once: the picture of {name}", took))
    until(lambda: cluster.places("flux") == [])
    return rows


def scaling(cluster: RayCluster, http: httpx.Client) -> list[Row]:
    wake(cluster, http)
    receipts = [submit(http, LONG) for _ in range(16)]
    wanted = until(lambda: cluster.wanted("flux") == 2)
    began = time.monotonic()
    cluster.add("gpu-80gb/2")
    joined = time.monotonic() - began
    ready = until(lambda: "gpu-80gb/2" in cluster.places("flux"))
    for receipt in receipts:
        end(http, receipt)
    began = time.monotonic()
    until(lambda: cluster.places("flux") == [])
    return [
        row("a backlog of 16: until another replica is wanted", wanted),
        row("until the node for it has joined", joined),
        row("until it is ready there", ready),
        row("after the last one: until both are gone (idle_s 5, hold_s 3)", time.monotonic() - began),
    ]


def failover(cluster: RayCluster, http: httpx.Client) -> list[Row]:
    wake(cluster, http)
    began = time.monotonic()
    end(http, submit(http, LONG))
    alone = time.monotonic() - began
    receipt = submit(http, LONG)
    next(document for document in follow(http, receipt) if document["logs"])
    [place] = cluster.places("flux")
    began = time.monotonic()
    cluster.kill(place)
    end(http, receipt)
    took = time.monotonic() - began
    cluster.add(place)
    return [
        row("a picture of 50 steps", alone),
        row("its node is killed meanwhile: from then until it is done on another", took),
    ]


def upgrade(cluster: RayCluster, http: httpx.Client) -> list[Row]:
    wake(cluster, http)
    with calling([cluster.url("front")], SHORT, CLIENTS) as callers:
        callers.await_more(3)
        began = time.monotonic()
        cluster.deploy(upgraded(cluster.config))
        until(cluster.are_running)
        took = time.monotonic() - began
        callers.await_more(3)
    return [row("rolling upgrade of gateways, dispatcher and FLUX", took, callers)]


def outage(cluster: RayCluster, http: httpx.Client) -> list[Row]:
    wake(cluster, http)
    with calling([cluster.url("front")], SHORT, CLIENTS) as callers:
        callers.await_more(3)
        began = time.monotonic()
        cluster.kill("head")
        callers.await_more(10)
        cluster.add("head")
        until(cluster.are_running)
        took = time.monotonic() - began
        callers.await_more(3)
    return [row("the head is killed, and comes back after ten requests", took, callers)]


def main() -> None:
    options = arguments(__doc__ or "")
    with ExitStack() as stack:
        began = time.monotonic()
        postgres = stack.enter_context(postgres_at_work())
        cluster = stack.enter_context(ray_cluster(NODES))
        joined = time.monotonic() - began
        serve(cluster, postgres.new_database())
        rows = [
            row("four nodes start", joined),
            row("until everything is served on them", time.monotonic() - began - joined),
        ]
        http = stack.enter_context(httpx.Client(base_url=cluster.url("front"), timeout=LIMIT_S))
        for part in (placement, scaling, failover, upgrade, outage):
            rows += part(cluster, http)
    show("Several nodes", rows, CAPTION, options.json)


if __name__ == "__main__":
    header()
    main()
