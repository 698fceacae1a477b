import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.clients.inputs import ALICE, BOB, LONG
from tests.support.server import Server, start, write_config
from tests.support.watching import follow, submit

MAX_BODY_BYTES = 1_000_000
NODE = Path(__file__).parent / "node"


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the whole suite. It runs one request at a time, so that others can be seen to wait."""
    path = write_config(tmp_path_factory.mktemp("clients"), front={"max_body_bytes": MAX_BODY_BYTES})
    config = yaml.safe_load(path.read_text())
    for deployment in config["applications"][0]["deployments"]:
        deployment["user_config"]["models"]["flux"]["window"] = 1
    path.write_text(yaml.safe_dump(config))
    server = start(path, keys=f"{ALICE} {BOB}")
    yield server
    assert server.stop() == 0


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


@pytest.fixture(scope="session")
def node_packages() -> Path:
    """The folder with the JavaScript clients, installed as the lock file says."""
    if not (NODE / "node_modules").exists():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=NODE, check=True, timeout=120)
    return NODE
