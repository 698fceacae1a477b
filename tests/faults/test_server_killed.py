"""The whole server dies at once; what it accepted goes on after a restart."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from tests.support.jobs import ENDPOINT
from tests.support.receivers import Receiver, is_genuine, keys_at, receiving
from tests.support.server import SHORT_LEASE, free_port, start, write_config
from tests.support.watching import follow, submit

LONG = {"prompt": "x", "seed": 1, "num_inference_steps": 50, "image_size": {"width": 768, "height": 768}}
SHORT = {"prompt": "x", "seed": 2, "num_inference_steps": 2, "image_size": {"width": 64, "height": 64}}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def test_accepted_requests_survive_a_kill_of_everything(tmp_path: Path, receiver: Receiver) -> None:
    here = {"allowed_networks": ["127.0.0.0/8"], "allowed_ports": []}
    webhooks = here | {"timeout_s": 10, "lease_s": 20}
    config = write_config(tmp_path, front={"lease": SHORT_LEASE, "webhooks": webhooks})
    port = free_port()
    gate = receiver.gates["/"] = threading.Event()
    server = start(config, port=port)
    with httpx.Client(base_url=server.url, timeout=90) as http:
        hooked = f"/queue/{ENDPOINT}?fal_webhook={quote(receiver.url, safe='')}%2F"
        told = http.post(hooked, json=SHORT).json()
        unanswered = receiver.next()
        running = submit(http, LONG)
        waiting = [submit(http, SHORT) for _ in range(12)]  # more than are handed over at once
        next(document for document in follow(http, running) if document["logs"])  # it denoises
    server.kill()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")

    gate.set()
    server = start(config, port=port)
    again = receiver.next()
    assert again.body == unanswered.body
    assert again.headers["x-fal-webhook-request-id"] == told["request_id"]
    assert all(is_genuine(post, keys_at(server.url), time.time()) for post in (unanswered, again))
    with httpx.Client(base_url=server.url, timeout=90) as http:
        for receipt, seed in [(running, 1), *((each, 2) for each in waiting)]:
            *_, last = follow(http, receipt)
            assert last["status"] == "COMPLETED"
            assert "error" not in last
            assert http.get(receipt["response_url"]).json()["seed"] == seed
    assert receiver.all() == []
    assert server.stop() == 0
