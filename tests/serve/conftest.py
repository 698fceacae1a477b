from collections.abc import Iterator

import pytest

from tests.support.server import SHORT_LEASE, Server, start, write_config


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the whole suite."""
    server = start(write_config(tmp_path_factory.mktemp("serve"), front={"lease": SHORT_LEASE}))
    yield server
    assert server.stop() == 0
    assert server.pids() == []
