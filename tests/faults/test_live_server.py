"""Processes of a whole server are killed and frozen while clients call it over HTTP."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.jobs import ENDPOINT
from tests.support.server import SHORT_LEASE, Server, start, write_config
from tests.support.watching import follow, submit

LONG = {"prompt": "x", "seed": 3, "num_inference_steps": 50, "image_size": {"width": 768, "height": 768}}
SHORT = {"prompt": "x", "seed": 4, "num_inference_steps": 2, "image_size": {"width": 64, "height": 64}}
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    server = start(write_config(folder, front={"lease": SHORT_LEASE}))
    yield server
    server.kill()


def kill_all(server: Server, name: str) -> None:
    """Every process of a kind; there is one at least."""
    pids = server.pids(name)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def insist(server: Server, document: dict[str, Any], key: str) -> dict[str, Any]:
    """Submit under a key until the server answers, as a client does that has lost the answer."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            headers = {"Idempotency-Key": key}
            answer = httpx.post(f"{server.url}/queue/{ENDPOINT}", json=document, headers=headers, timeout=30)
        except httpx.TransportError:
            continue
        if answer.status_code == 200:
            receipt: dict[str, Any] = answer.json()
            return receipt
        # beside 5xx: a proxy of Serve's that has just come up knows no path yet
        assert answer.status_code >= 500 or "-/routes" in answer.text, answer.text
    raise AssertionError("the server took nothing")


def end(server: Server, receipt: dict[str, Any]) -> dict[str, Any]:
    """Ask until it is completed, whatever happens to the connection. Returns the output."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(receipt["status_url"], timeout=30)
            if answer.status_code in (200, 202) and answer.json()["status"] == "COMPLETED":
                result: dict[str, Any] = httpx.get(receipt["response_url"], timeout=30).json()
                return result
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("it did not end")


@pytest.mark.parametrize("name", ["darkroom:gateway", "haproxy"], ids=["f03 gateway", "f04 proxy"])
def test_f03_f04_what_is_killed_between_client_and_queue_loses_and_doubles_nothing(
    server: Server, name: str
) -> None:
    keys = [uuid4().hex for _ in range(24)]
    receipts: dict[str, list[str]] = {key: [] for key in keys}
    found: dict[str, dict[str, Any]] = {}

    def call(mine: list[str]) -> None:
        for key in mine:
            for _ in range(2):
                found[key] = insist(server, SHORT, key)
                receipts[key].append(found[key]["request_id"])

    callers = [threading.Thread(target=call, args=(keys[n::4],)) for n in range(4)]
    for caller in callers:
        caller.start()
    while not any(receipts.values()):
        time.sleep(0.01)
    kill_all(server, name)
    for caller in callers:
        caller.join(PATIENCE_S)
    assert [len(each) for each in receipts.values()] == [2] * len(keys)
    assert all(len(set(each)) == 1 for each in receipts.values())
    assert len({each for ids in receipts.values() for each in ids}) == len(keys)
    assert [end(server, found[key])["seed"] for key in keys] == [4] * len(keys)


def test_f05_a_killed_controller_costs_no_request(server: Server) -> None:
    end(server, insist(server, SHORT, uuid4().hex))  # it has come back from what was before
    with httpx.Client(base_url=server.url, timeout=90) as http:
        running = submit(http, LONG)
        kill_all(server, "ServeController")
        receipts = [submit(http, SHORT) for _ in range(5)]
        for receipt, seed in [(running, 3), *((each, 4) for each in receipts)]:
            *_, last = follow(http, receipt)
            assert last["status"] == "COMPLETED"
            assert "error" not in last
            assert http.get(receipt["response_url"]).json()["seed"] == seed


def test_f02_a_frozen_worker_is_given_up_and_its_request_runs_again(server: Server) -> None:
    end(server, insist(server, SHORT, uuid4().hex))
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        receipt = submit(http, LONG)
        next(document for document in follow(http, receipt) if document["logs"])  # it denoises
        [pid] = server.pids("flux:worker")
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until_given_up(server, receipt)
        finally:
            wake(pid)
        assert end(server, receipt)["seed"] == 3


def wait_until_given_up(server: Server, receipt: dict[str, Any]) -> None:
    """Until the dispatcher has counted the worker as lost. Then the request may be handed to it again."""
    deadline = time.monotonic() + PATIENCE_S
    line = f"request {receipt['request_id']} lost its worker: The worker was silent"
    while line not in server.log.read_text():
        assert time.monotonic() < deadline, "the frozen worker keeps its request"
        time.sleep(0.1)


def wake(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass  # it was replaced
