"""What Prometheus finds at a server that has worked."""

import time

import httpx

from tests.support.server import Server

PATIENCE_S = 60.0
FIELDS = {"prompt": "a lighthouse", "num_inference_steps": 2, "image_size": {"width": 64, "height": 64}}


def scraped(server: Server) -> str:
    return httpx.get(server.metrics_url, timeout=30).text


def test_metrics_of_every_process_come_out_of_the_nodes_port(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        assert http.post("/run/fal-ai/flux/dev", json=FIELDS).status_code == 200
        assert http.post("/run/fal-ai/flux/dev", json={}).status_code == 422
    wanted = (
        "darkroom_requests_accepted_total{",
        "darkroom_calls_refused_total{",
        "darkroom_requests_ended_total{",
        "darkroom_request_wait_seconds_bucket{",
        "darkroom_request_run_seconds_count{",
        "darkroom_requests_waiting{",
        "darkroom_store_up{",
        "darkroom_files_free_bytes{",
        "darkroom_stage_seconds_bucket{",
        "darkroom_batch_rows_count{",
        "darkroom_adapter_bytes{",
    )
    deadline = time.monotonic() + PATIENCE_S
    missing = list(wanted)
    while missing and time.monotonic() < deadline:
        text = scraped(server)
        missing = [name for name in wanted if f"ray_{name}" not in text]
        time.sleep(0.5)
    assert not missing, sorted(
        {line.split("{")[0] for line in text.splitlines() if line.startswith("ray_darkroom_")}
    )
    assert 'stage="denoise"' in text
