"""A killed process loses no accepted request."""

import os
import signal
from typing import Any

import httpx
import pytest

from tests.support.server import Server
from tests.support.watching import follow, submit

LONG = {"prompt": "x", "seed": 3, "num_inference_steps": 50, "image_size": {"width": 768, "height": 768}}
SHORT = {"prompt": "x", "seed": 3, "num_inference_steps": 2, "image_size": {"width": 64, "height": 64}}


def kill_one(server: Server, name: str) -> None:
    [pid] = server.pids(name)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["flux:worker", "darkroom:dispatcher"])
def test_a_request_survives_the_kill_of_a_process_mid_denoise(server: Server, name: str) -> None:
    with httpx.Client(base_url=server.url, timeout=90) as http:
        receipt = submit(http, LONG)
        statuses = follow(http, receipt)
        next(document for document in statuses if document["logs"])  # it denoises
        kill_one(server, name)
        last: dict[str, Any] = {}
        for last in statuses:
            assert "error" not in last
        assert last["status"] == "COMPLETED"
        assert http.get(receipt["response_url"]).json()["seed"] == 3


def test_a_killed_gateway_comes_back_with_everything_it_accepted(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=90) as http:
        receipt = submit(http, SHORT)
    kill_one(server, "darkroom:gateway")
    answer = None
    while answer is None or answer.status_code == 503:  # HAProxy's, while none is there
        try:
            answer = httpx.get(receipt["status_url"], timeout=10)
        except httpx.TransportError:
            continue
    assert answer.status_code in (200, 202), answer.text
    with httpx.Client(base_url=server.url, timeout=90) as http:
        *_, last = follow(http, receipt)
    assert last["status"] == "COMPLETED"
    assert "error" not in last
