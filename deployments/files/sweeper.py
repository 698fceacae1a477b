"""Removes what nobody needs any more: files whose time is over, and uploads that were given up.

What is to be done stands in the store alone, and each step may be done twice. So a sweep that was cut off
is finished by the next, of whatever process, and several at once do no harm.
"""

import asyncio
import contextvars
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import obstore

from deployments.files.store import FileStore
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

    async def sweep(self) -> int:
        """Remove what is due now. Returns how many files' time was over."""
        await asyncio.to_thread(self._remove_given_up)
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
                count += await self._remove(mark[2])
                if int(mark[1]) + TICKET_S <= now:
                    await self._remove(f"details/{mark[2]}")
                    await self._remove(each["path"])
        return count

    async def _remove(self, name: str) -> bool:
        """Whether it was there."""
        try:
            await obstore.delete_async(self._files.objects, name)
        except FileNotFoundError:
            return False
        return True

    def _remove_given_up(self) -> None:
        """What nobody has touched since its ticket ended: uploads, and what a killed process was writing.

        An upload's folder changes with every part that comes.
        """
        for begun in self._left((self._files.folder / "uploads").glob("*")):
            shutil.rmtree(begun, ignore_errors=True)
        for torn in self._left(self._files.folder.rglob("*#*")):
            torn.unlink(missing_ok=True)

    def _left(self, paths: Iterable[Path]) -> list[Path]:
        """Those that are old. What goes meanwhile is another's."""
        end = self._files.clock() - TICKET_S - SLACK_S
        return [path for path in paths if (changed := _changed_at(path)) is not None and changed <= end]


def _changed_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
