"""A server whose queue is PostgreSQL: the same walk, and it outlives the database's absence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.jobs import ENDPOINT
from tests.support.postgres import PostgresServer, postgres_at_work
from tests.support.server import SHORT_LEASE, Server, start, write_config
from tests.support.watching import follow, submit

SMALL = {"prompt": "x", "seed": 2, "num_inference_steps": 2, "image_size": {"width": 64, "height": 64}}


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresServer]:
    """One that may be stopped."""
    with postgres_at_work() as server:
        yield server


@pytest.fixture(scope="module")
def server(own_postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("postgres")
    front = {"queue_url": own_postgres.new_database("template1"), "lease": SHORT_LEASE}
    server = start(write_config(folder, front=front))
    yield server
    assert server.stop() == 0
    assert not list(Path(folder).glob("*.sqlite3"))


def test_a_request_ends_and_others_wait_for_a_database_that_went_away(
    server: Server, own_postgres: PostgresServer
) -> None:
    with httpx.Client(base_url=server.url, timeout=90) as http:
        assert ends(http, submit(http, SMALL))
        own_postgres.stop(immediately=True)
        away = http.post(f"/queue/{ENDPOINT}", json=SMALL)
        assert away.status_code == 503
        own_postgres.start()
        assert ends(http, submit(http, SMALL))


def ends(http: httpx.Client, request: dict[str, Any]) -> bool:
    """Whether it is completed, as its status stream says, and has its picture."""
    *_, last = follow(http, request)
    output = http.get(request["response_url"]).json()
    return last["status"] == "COMPLETED" and http.get(output["images"][0]["url"]).status_code == 200
