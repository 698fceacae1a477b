from collections.abc import AsyncIterator

import pytest

from deployments.queue import Queue, open_database
from schemas.settings import LeaseSettings
from tests.support.jobs import Clock

LEASE = LeaseSettings(lease_s=30, heartbeat_s=10, max_crashes=3, backoff_s=4)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def queue(queue_url: str, clock: Clock) -> AsyncIterator[Queue]:
    """The queue on every store there is."""
    queue = Queue(open_database(queue_url), LEASE, clock=clock)
    yield queue
    await queue.close()
