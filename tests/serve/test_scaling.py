"""A model that starts when it is needed and goes when it is not, and what that costs a request: time only."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.server import SHORT_LEASE, Server, start, write_config
from tests.support.watching import follow, submit

SHORT = {"prompt": "x", "seed": 3, "num_inference_steps": 2, "image_size": {"width": 64, "height": 64}}
LONG = {"prompt": "x", "seed": 3, "num_inference_steps": 50, "image_size": {"width": 1024, "height": 1024}}
LONG |= {"num_images": 2}
FULL = 5  # requests that a replica takes: the one it runs, and four that wait there
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """No replica at first, two at most, of which one goes at once when one is enough."""
    model = {
        "min_replicas": 0,
        "max_replicas": 2,
        "concurrency": 1,
        "autoscaling": {"target_wait_s": 1, "start_s": 0, "hold_s": 0, "idle_s": 3},
    }
    config = write_config(tmp_path_factory.mktemp("scaling"), front={"lease": SHORT_LEASE}, model=model)
    server = start(config)
    yield server
    assert server.stop() == 0
    assert server.pids() == []


def workers(server: Server) -> int:
    return len(server.pids("flux:worker"))


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_first_request_wakes_the_model_and_waits_and_so_does_the_next_after_it_slept(
    server: Server,
) -> None:
    assert workers(server) == 0
    with httpx.Client(base_url=server.url, timeout=LIMIT_S) as http:
        for _ in range(2):
            receipt = submit(http, SHORT)
            *_, last = follow(http, receipt)
            assert last["status"] == "COMPLETED"
            assert "error" not in last
            assert http.get(receipt["response_url"]).json()["seed"] == 3
            until(lambda: workers(server) == 0)


def test_a_replica_that_goes_ends_its_picture_first(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=LIMIT_S) as http:

        def running(receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [each for each in receipts if steps(http, each) and state(http, each) == "IN_PROGRESS"]

        waiting = [submit(http, LONG) for _ in range(FULL + 1)]
        until(lambda: bool(running(waiting)))
        [first] = running(waiting)
        waiting.remove(first)
        until(lambda: bool(running(waiting)))
        [second] = running(waiting)
        waiting.remove(second)
        assert state(http, first) == "IN_PROGRESS", "the second runs on a replica of its own, the newest"
        before = removals(server)
        for each in (first, *waiting):
            http.put(each["cancel_url"])
        until(lambda: removals(server) > before)
        assert state(http, second) == "IN_PROGRESS", "its replica is told to go"
        *_, last = follow(http, second)
        assert last["status"] == "COMPLETED"
        assert "error" not in last
        assert len(steps(http, second)) == len(set(steps(http, second))) == 50, "it ran once"
        until(lambda: workers(server) == 0)


def state(http: httpx.Client, receipt: dict[str, Any]) -> str:
    return str(http.get(receipt["status_url"]).json()["status"])


def steps(http: httpx.Client, receipt: dict[str, Any]) -> list[str]:
    lines = [line["message"] for line in http.get(f"{receipt['status_url']}?logs=1").json()["logs"] or []]
    return [line for line in lines if line.startswith("step ")]


def removals(server: Server) -> int:
    """How often Serve has let one of the workers go, as its log says."""
    return server.log.read_text().count("Removing 1 replica from Deployment(name='worker', app='flux')")
