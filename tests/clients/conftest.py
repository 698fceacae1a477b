import gc
import json
import subprocess
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import fal_client
import fal_client.client
import httpx
import pytest
import yaml

from tests.clients.halves import Connect, settled
from tests.clients.inputs import (
    ALICE,
    BOB,
    CANNY_PICTURES,
    LONG,
    UNIVERSAL_EXAMPLE,
    UNIVERSAL_SIDE,
    drawing,
    encoded,
    shapes,
)
from tests.support.canaries import leaks, secrets_of
from tests.support.collector import Collector, collecting
from tests.support.node import install
from tests.support.receivers import Receiver, receiving
from tests.support.server import Server, start, write_config
from tests.support.sites import serving
from tests.support.watching import follow, submit

MODELS = ("flux", "sdxl-canny", "sd")  # the applications of serve_config.yaml that the suite calls
MAX_BODY_BYTES = 1_000_000
MAX_UPLOAD_BYTES = 106_000_000  # a little more than what the clients send in parts by themselves
BODY_GRACE_S = 5
WAYS = [
    "proxyUrl",  # @fal-ai/client: proxyUrl, for every request
    "middleware",  # @fal-ai/client: a requestMiddleware to the proxy
    "prefixes",  # @fal-ai/client: a requestMiddleware that turns fal's hosts into path prefixes
    "serverless",  # @fal-ai/serverless-client, its predecessor: a requestMiddleware to the proxy
]

Tell = Callable[..., dict[str, Any]]  # a script and what it is given → its report


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """What the server tells its traces to."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    """One server for the whole suite. Each model runs one request at a time, so that others can be seen to
    wait, and may fetch from this machine."""
    folder = tmp_path_factory.mktemp("clients")
    here = {"allowed_networks": ["127.0.0.0/8"], "allowed_ports": []}
    front: dict[str, Any] = {
        "max_body_bytes": MAX_BODY_BYTES,
        "max_upload_bytes": MAX_UPLOAD_BYTES,
        "run_grace_s": 5,
        "body_grace_s": BODY_GRACE_S,
    }
    front["webhooks"] = here | {"retries_s": [0.1, 0.1], "timeout_s": 5}
    model = {"fetch": here, "weights": {"cache": f"file://{folder}/weights"}}
    path = write_config(folder, front=front, model=model, models=MODELS)
    config = yaml.safe_load(path.read_text())
    for deployment in config["applications"][0]["deployments"]:
        for entry in deployment["user_config"]["models"].values():
            entry["window"] = 1
    universal = config["applications"][-1]["args"]
    universal["bases"]["names"][UNIVERSAL_EXAMPLE["model_name"]] = "zoo:sdxl"
    universal["limits"] = {"max_pixels": UNIVERSAL_SIDE**2}
    path.write_text(yaml.safe_dump(config))
    traces = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    keys = f"{ALICE} {BOB}"
    server = start(path, keys=keys, environment=traces)
    yield server
    metrics = httpx.get(server.metrics_url).raise_for_status().text
    assert server.stop() == 0
    told = [metrics, str(collector.raw)]
    assert [each for each in secrets_of(keys) if any(each in text for text in told)] == []
    assert leaks(secrets_of(keys), [folder, server.ray_logs]) == []  # t23, over the whole suite


@pytest.fixture(scope="package")
def alice(server: Server) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Key {ALICE}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="package")
def bob(server: Server) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Key {BOB}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="package")
def stranger(server: Server) -> Iterator[httpx.Client]:
    """A caller without a key."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def busy(alice: httpx.Client) -> Iterator[dict[str, Any]]:
    """The receipt of a request of alice's that keeps the engine busy until the test is over."""
    receipt = submit(alice, LONG)
    for status in follow(alice, receipt):
        if status["status"] == "IN_PROGRESS":
            break
    yield receipt
    alice.put(receipt["cancel_url"])
    assert [*follow(alice, receipt)][-1]["status"] == "COMPLETED"


@pytest.fixture(scope="package")
def canny_pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The pictures of the canny endpoint's page on a host of ours: field → URL. They differ in size."""
    folder: Path = tmp_path_factory.mktemp("canny")
    images = {"control_image_url": encoded(shapes()), "image_url": encoded(drawing(), "JPEG")}
    for field, path in CANNY_PICTURES.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(images[field])
    with serving(folder) as site:
        yield {field: f"{site}/{path}" for field, path in CANNY_PICTURES.items()}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """An application that waits for webhooks."""
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def node_packages() -> Path:
    """The folder with the JavaScript clients, installed as the lock file says."""
    return install()


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tell(way: str, server: Server, node_packages: Path) -> Tell:
    """Runs a script with one of the JavaScript clients."""

    def run(script: str, given: Any = None) -> dict[str, Any]:
        done = subprocess.run(
            ["node", "--experimental-websocket", script, way, server.url],
            cwd=node_packages,
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    return run


@pytest.fixture(params=["SyncClient", "AsyncClient"])
async def connect(
    request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Connect]:
    """Makes Python clients."""
    monkeypatch.setattr(fal_client.client, "RUN_URL_FORMAT", f"{server.url}/run/")
    monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", f"{server.url}/queue/")
    monkeypatch.setattr(fal_client.client, "REST_URL", f"{server.url}/rest")
    monkeypatch.setattr(fal_client.client, "CDN_URL", f"{server.url}/cdn")
    monkeypatch.setattr(
        fal_client.client, "REALTIME_URL_FORMAT", f"{server.url.replace('http', 'ws', 1)}/run/"
    )
    clients: list[Any] = []

    def make(key: str) -> Any:
        clients.append(getattr(fal_client, request.param)(key=key))
        return clients[-1]

    yield make
    for client in clients:
        connections = await settled(client._client)
        is_async = isinstance(connections, httpx.AsyncClient)
        await settled(connections.aclose() if is_async else connections.close())
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # see UPLOADING
        gc.collect()


@pytest.fixture
def fal(connect: Connect) -> Any:
    return connect(ALICE)
