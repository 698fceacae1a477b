"""Room for so many jobs at once; who waits for it enters by priority, and then in the order of coming."""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from schemas.jobs import Priority


class Slots:
    """As a semaphore, with priorities. Used on one event loop."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[Priority, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def locked(self) -> bool:
        """Whether a job that comes now has to wait."""
        return self._free == 0

    @asynccontextmanager
    async def held(self, priority: Priority) -> AsyncIterator[None]:
        await self._acquire(priority)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, priority: Priority) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given the slot at the same moment
                self._release()
            raise

    def _release(self) -> None:
        """To whoever waits, or back."""
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():  # it gave up
                turn.set_result(None)
                return
        self._free += 1
