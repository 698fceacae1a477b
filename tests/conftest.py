"""What every test shares: no hub, one torch thread, the tiny model, a PostgreSQL server."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments import traces
from pipelines import zoo
from tests.support.postgres import PostgresServer, postgres_at_work

# The same examples on every machine, or, where it is to look deeper, each time others.
hypothesis.settings.register_profile(
    "darkroom", derandomize="DARKROOM_FUZZ" not in os.environ, database=None, deadline=None
)
hypothesis.settings.load_profile("darkroom")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded FLUX, built for this session."""
    return zoo.locate("flux", tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """Has every span that this process tells."""
    exporter = InMemorySpanExporter()
    traces.send_to(SimpleSpanProcessor(exporter), "gateway")
    yield exporter
    traces.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server of this session's own, started when it is first asked for."""
    with postgres_at_work() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    """A database of the test's own, with the queue's tables."""
    return postgres.new_database()


@pytest.fixture(params=["sqlite", "postgres"])
def queue_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty queue on every store there is."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/queue.sqlite3"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.emptied_database()
