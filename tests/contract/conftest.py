from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deployments.queue import Queue
from deployments.queue.sqlite import SqliteDatabase
from schemas.settings import LeaseSettings
from tests.support.jobs import Clock

LEASE = LeaseSettings(lease_s=30, heartbeat_s=10, max_crashes=3, backoff_s=4)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite"])
async def queue(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[Queue]:
    """The queue on every store there is."""
    queue = Queue(SqliteDatabase(tmp_path / "queue.sqlite3"), LEASE, clock=clock)
    yield queue
    await queue.close()
