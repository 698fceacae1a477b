from collections.abc import Iterator

import pytest

from tests.support.server import SHORT_LEASE, Server, start, write_config


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the whole suite. It may fetch from this machine."""
    folder = tmp_path_factory.mktemp("serve")
    here = {"allowed_networks": ["127.0.0.0/8"], "allowed_ports": []}
    model = {"fetch": here, "weights": {"cache": f"file://{folder}/weights"}}
    server = start(write_config(folder, front={"lease": SHORT_LEASE}, model=model))
    yield server
    assert server.stop() == 0
    assert server.pids() == []
