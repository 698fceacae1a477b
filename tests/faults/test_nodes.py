"""Several Ray nodes run production's configuration; nodes, GCS and head are killed, and new ones come.

One cluster for all. A test may add nodes, but leaves those that it found.
"""

import random
from collections.abc import Iterator

import httpx
import pytest

from tests.faults.conftest import SCALE
from tests.support.callers import calling
from tests.support.postgres import PostgresServer
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

BACKLOG = 16  # more than a replica takes
long_form = pytest.mark.skipif(SCALE == 1, reason="of the long form: make faults")


@pytest.fixture(scope="module")
def cluster(postgres: PostgresServer) -> Iterator[RayCluster]:
    with ray_cluster(NODES) as cluster:
        serve(cluster, postgres.new_database())
        yield cluster


@pytest.fixture
def http(cluster: RayCluster) -> Iterator[httpx.Client]:
    """A client of the front's node."""
    with httpx.Client(base_url=cluster.url("front"), timeout=LIMIT_S) as http:
        yield http


def have(cluster: RayCluster, *names: str) -> None:
    """Add what is not there, as KubeRay's autoscaler does."""
    for name in names:
        if name not in cluster.ids:
            cluster.add(name)


def test_sleeping_models_start_where_their_labels_and_fractions_say(
    cluster: RayCluster, http: httpx.Client
) -> None:
    assert cluster.places("darkroom", "gateway") == ["front", "front"]
    assert cluster.places("darkroom", "dispatcher") == ["front"]
    for name in EACH:
        assert cluster.places(name, "entry") == ["front"]
        assert cluster.places(name) == []
    receipts = [submit(http, document, endpoint) for endpoint, document in EACH.values()]
    until(lambda: cluster.places("flux") == ["gpu-80gb"], "FLUX")
    for receipt in receipts:
        end(http, receipt)
    until(lambda: cluster.places("sdxl-canny") == cluster.places("sd") == ["gpu-48gb"], "the others")
    assert cluster.gpus("gpu-48gb") == pytest.approx((0.95, 1.0)), "they share a card"
    until(lambda: cluster.places("flux") == [], "its sleep")
    until(lambda: cluster.gpus("gpu-80gb") == (0.0, 1.0), "a node that may be taken away")


def test_a_backlog_starts_another_replica_on_a_new_node_and_both_go_after_it(
    cluster: RayCluster, http: httpx.Client
) -> None:
    waiting = [submit(http, LONG) for _ in range(BACKLOG)]
    until(lambda: cluster.wanted("flux") == 2, "the wish for another replica")
    have(cluster, "gpu-80gb/2")
    until(lambda: cluster.places("flux") == ["gpu-80gb", "gpu-80gb/2"], "the other replica")
    for receipt in waiting:
        end(http, receipt)
    until(lambda: cluster.places("flux") == [], "its sleep")


def test_f06_what_ran_on_a_killed_node_runs_on_another(cluster: RayCluster, http: httpx.Client) -> None:
    have(cluster, "gpu-80gb", "gpu-80gb/2")
    until(lambda: cluster.places("flux") == [], "its sleep")
    running = submit(http, LONG)
    next(document for document in follow(http, running) if document["logs"])  # it denoises
    waiting = [submit(http, SHORT) for _ in range(4)]
    [place] = cluster.places("flux")
    cluster.kill(place)
    for receipt in (running, *waiting):
        end(http, receipt)
    log = http.get(f"{running['status_url']}?logs=1").json()["logs"]
    assert [line["message"] for line in log].count("step 1/50") == 2, "it began anew"
    cluster.add(place)


def test_f27_a_rolling_deploy_under_load_costs_no_answer(cluster: RayCluster, http: httpx.Client) -> None:
    wake(cluster, http)
    parts = [("darkroom", "gateway"), ("darkroom", "dispatcher"), ("flux", "worker")]
    with calling([cluster.url("front")], SHORT) as callers:
        callers.await_more(3)
        before = {each["replica_id"] for part in parts for each in cluster.replicas(*part)}
        cluster.deploy(upgraded(cluster.config))
        until(cluster.are_running, "the new ones")
        callers.await_more(3)
        now = {each["replica_id"] for part in parts for each in cluster.replicas(*part)}
    assert callers.faults == callers.wrong == []
    assert not before & now, "all were replaced"


@long_form
def test_f07_without_the_gcs_everything_goes_on_and_models_start_again_after_it_came_back(
    cluster: RayCluster, http: httpx.Client
) -> None:
    wake(cluster, http)
    with calling([cluster.url("front")], SHORT) as callers:
        callers.await_more(3)
        cluster.kill_gcs()
        callers.await_more(10)
        cluster.start_gcs()
    assert callers.faults == callers.wrong == []
    until(lambda: cluster.places("flux") == [], "its sleep")
    wake(cluster, http)


def test_f07_what_is_accepted_before_and_without_the_head_is_done_and_nobody_is_refused(
    cluster: RayCluster, http: httpx.Client
) -> None:
    until(lambda: cluster.places("flux") == [], "its sleep")
    [before] = cluster.replicas("sd", "worker")
    receipts = [submit(http, SHORT)]
    cluster.kill("head")
    receipts += [submit(http, SHORT) for _ in range(5)]
    for receipt in receipts:
        assert http.get(receipt["status_url"]).status_code in (200, 202)
    cluster.add("head")
    for receipt in receipts:
        end(http, receipt)
    until(cluster.are_running, "the applications")
    [after] = cluster.replicas("sd", "worker")
    assert after["replica_id"] == before["replica_id"], "who runs goes on"


@long_form
def test_f30_nodes_die_one_after_another_while_clients_call(cluster: RayCluster, http: httpx.Client) -> None:
    have(cluster, "front/2", "gpu-80gb", "gpu-80gb/2")
    chance = random.Random(7)
    urls = [cluster.url("front"), cluster.url("front/2")]
    with calling(urls, SHORT) as callers:
        for _ in range(2 * SCALE):
            name = chance.choice(["head", "front", "front/2", "gpu-80gb", "gpu-80gb/2"])
            cluster.kill(name)
            cluster.add(name)
            callers.await_more(3)
    assert len(callers.done) == len(set(callers.done))
    assert callers.wrong == []
