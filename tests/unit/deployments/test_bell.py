import asyncio

import pytest

from deployments.queue.bell import Bell


@pytest.mark.parametrize("turns", range(4))
async def test_who_is_cancelled_as_the_bell_rings_is_cancelled(turns: int) -> None:
    bell = Bell()
    waiting = asyncio.create_task(bell.wait(60))
    await asyncio.sleep(0)
    bell.wake()
    for _ in range(turns):
        await asyncio.sleep(0)
    was_done = waiting.done()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled() or was_done
