"""Removes what nobody needs any more: files whose time is over, and uploads that were given up.

What is to be done stands in the store alone, and each step may be done twice. So a sweep that was cut off
is finished by the next, of whatever process, and several at once do no harm.
"""

import asyncio
import contextvars
import logging
import re

import obstore

from deployments import crash, metrics
from deployments.files.store import FileStore, sent_name
from deployments.files.uploads import SLACK_S, TICKET_S

logger = logging.getLogger(__name__)

_MARK = re.compile(r"expiring/(\d{1,12})_(.+)", re.ASCII)


class Sweeper:
    """One per front; several do no harm. The time is the file store's."""

    def __init__(self, files: FileStore, interval_s: float) -> None:
        self._files = files
        self._interval_s = interval_s
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Sweep now, and then at every interval."""
        self._loop = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    @property
    def is_alive(self) -> bool:
        return self._loop is None or not self._loop.done()

    async def close(self) -> None:
        """Stop, in the middle of a sweep if need be."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait([self._loop])

    def measure(self) -> None:
        """Tell the metrics how much is free. To be done often: Ray forgets a gauge that is not set again."""
        free_bytes = self._files.place.free_bytes()
        if free_bytes is not None:
            metrics.DISK_FREE.set(free_bytes)

    async def sweep(self) -> int:
        """Remove what is due now. Returns how many files' time was over."""
        # What nobody has touched since its ticket ended was given up.
        await self._files.place.clear_left("uploads", self._files.clock() - TICKET_S - SLACK_S)
        crash.point("files.cleared")
        return await self._remove_expired()

    async def _run(self) -> None:
        while True:
            try:
                if count := await self.sweep():
                    logger.info("removed %d files whose time was over", count)
            except Exception:
                logger.exception("the file store could not be swept")
            await asyncio.sleep(self._interval_s)

    async def _remove_expired(self) -> int:
        """The mark goes last, and while a ticket could make the file again it stays."""
        now = self._files.clock()
        count = 0
        async for batch in obstore.list(self._files.objects, "expiring"):
            for each in batch:
                mark = _MARK.fullmatch(each["path"])
                if mark is None or int(mark[1]) > now:
                    continue
                key = mark[2]
                if await self._files.is_there(key):
                    count += await self._remove(key)
                    crash.point("files.expired")
                if sent_name(key) is None or int(mark[1]) + TICKET_S <= now:
                    await self._remove(f"details/{key}")
                    crash.point("files.details_removed")
                    await self._remove(each["path"])
                    crash.point("files.mark_removed")
        return count

    async def _remove(self, name: str) -> bool:
        """Whether it was there."""
        try:
            await obstore.delete_async(self._files.objects, name)
        except FileNotFoundError:
            return False
        return True
