"""The whole server dies at once; what it accepted goes on after a restart."""

from pathlib import Path

import httpx
import pytest

from tests.support.server import SHORT_LEASE, free_port, start, write_config
from tests.support.watching import follow, submit

LONG = {"prompt": "x", "seed": 1, "num_inference_steps": 50, "image_size": {"width": 768, "height": 768}}
SHORT = {"prompt": "x", "seed": 2, "num_inference_steps": 2, "image_size": {"width": 64, "height": 64}}


def test_accepted_requests_survive_a_kill_of_everything(tmp_path: Path) -> None:
    config = write_config(tmp_path, front={"lease": SHORT_LEASE})
    port = free_port()
    server = start(config, port=port)
    with httpx.Client(base_url=server.url, timeout=90) as http:
        running = submit(http, LONG)
        waiting = [submit(http, SHORT) for _ in range(12)]  # more than are handed over at once
        next(document for document in follow(http, running) if document["logs"])  # it denoises
    server.kill()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")

    server = start(config, port=port)
    with httpx.Client(base_url=server.url, timeout=90) as http:
        for receipt, seed in [(running, 1), *((each, 2) for each in waiting)]:
            *_, last = follow(http, receipt)
            assert last["status"] == "COMPLETED"
            assert "error" not in last
            assert http.get(receipt["response_url"]).json()["seed"] == seed
    assert server.stop() == 0
