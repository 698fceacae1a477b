"""What the server adds to a picture: /run and the queue beside the same model called in-process.

The direct call prepares, denoises, decodes and compresses on one thread. The server does the same
work and, which is its overhead, also HTTP, validation, a durable queue, Ray Serve and a stored file.
"""

import json
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import torch

from benchmarks.measure import Row, arguments, cpu_s, header, percentile, serving, show, timed
from pipelines import images, zoo
from pipelines.base import Assets
from pipelines.flux.flux_dev import Pipeline
from pipelines.flux.model import FluxModel
from schemas.endpoints.flux_dev import Input
from schemas.settings import ModelSettings
from tests.support.jobs import ENDPOINT

ROUNDS, BLOCK, WARM_UP = 4, 50, 20
REQUEST = {
    "prompt": "a lighthouse",
    "image_size": {"width": 64, "height": 64},
    "num_inference_steps": 2,
    "seed": 7,
    "enable_safety_checker": False,
}
AIM = {"POST /run": (30.0, 15.0)}  # ms of wall at p50, CPU-ms, both over the direct call
AIMS = "aims for /run: p50 at most 30 ms and 15 CPU-ms over the direct call"


def direct() -> Callable[[], None]:
    """One request on the pipeline itself."""
    settings = ModelSettings(model="zoo:flux", endpoints=(ENDPOINT,), max_sequence_length=32)
    pipeline = Pipeline(FluxModel.load(settings, lambda _: zoo.locate("flux")))

    @torch.inference_mode()
    def call() -> None:
        request = Input.model_validate(REQUEST)
        [sample] = pipeline.prepare(request, Assets(), 0).samples
        while not sample.is_done:
            [prediction] = pipeline.model.predict([sample])
            sample.accept(sample.plan.advance(sample.step, sample.latents, prediction, sample.denoised))
        assert images.encode(pipeline.finish(sample), "jpeg")

    return call


def run(http: HTTPConnection) -> None:
    http.request("POST", f"/run/{ENDPOINT}", json.dumps(REQUEST))
    answer = http.getresponse()
    body = answer.read()
    assert answer.status == 200, body


def queue(http: HTTPConnection) -> None:
    """Submit, follow the stream to its end, fetch the result."""
    http.request("POST", f"/queue/{ENDPOINT}", json.dumps(REQUEST))
    path = urlsplit(json.loads(http.getresponse().read())["response_url"]).path
    http.request("GET", f"{path}/status/stream")
    assert b'"COMPLETED"' in http.getresponse().read()
    http.request("GET", path)
    answer = http.getresponse()
    body = answer.read()
    assert answer.status == 200, body


def measure(folder: Path) -> list[Row]:
    torch.set_num_threads(1)
    with serving(folder) as server:
        http = HTTPConnection(urlsplit(server.url).netloc)
        calls: dict[str, Callable[[], None]] = {
            "in-process": direct(),
            "POST /run": lambda: run(http),
            "queue: submit, stream, result": lambda: queue(http),
        }
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        began, used = time.perf_counter(), cpu_s(server.pids())
        time.sleep(5)
        idle = (cpu_s(server.pids()) - used) / (time.perf_counter() - began)
        wall: dict[str, list[float]] = {name: [] for name in calls}
        cpu = dict.fromkeys(calls, 0.0)
        for _ in range(ROUNDS):
            for name, call in calls.items():
                own, theirs = time.process_time(), cpu_s(server.pids())
                wall[name] += [timed(call) for _ in range(BLOCK)]
                cpu[name] += (
                    time.process_time() - own if name == "in-process" else cpu_s(server.pids()) - theirs
                )
    return [_row(name, wall, cpu, idle) for name in calls]


def _row(name: str, wall: dict[str, list[float]], cpu: dict[str, float], idle: float) -> Row:
    ours, plain = wall[name], wall["in-process"]
    cpu_ms, plain_cpu_ms = (1e3 * cpu[each] / len(wall[each]) for each in (name, "in-process"))
    idle_ms = 0.0 if ours is plain else idle * 1e3 * sum(ours) / len(ours)
    over = 1e3 * (percentile(ours, 50) - percentile(plain, 50))
    over_cpu = cpu_ms - plain_cpu_ms
    aim = AIM.get(name)
    return {
        "way": name,
        "p50 ms": 1e3 * percentile(ours, 50),
        "p99 ms": 1e3 * percentile(ours, 99),
        "CPU-ms": cpu_ms,
        "idle CPU-ms": idle_ms,
        "over p50 ms": over,
        "over p99 ms": 1e3 * (percentile(ours, 99) - percentile(plain, 99)),
        "over CPU-ms": over_cpu,
        "aim": "" if aim is None else "met" if over <= aim[0] and over_cpu <= aim[1] else "missed",
    }


def main() -> None:
    options = arguments("Overhead of the server over the pipeline in-process.")
    show(
        f"overhead: 64×64, 2 steps, one at a time, {ROUNDS * BLOCK} requests each, interleaved by {BLOCK}",
        measure(options.dir),
        f"{AIMS}. CPU-ms: all of the server's processes; idle CPU-ms of it they use without any request",
        options.json,
    )


if __name__ == "__main__":
    header()
    main()
