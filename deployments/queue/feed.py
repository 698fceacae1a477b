"""The feed of changes: whoever watches a request is woken when it changed, in whatever process."""

import asyncio
import contextvars
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Connection

from deployments.queue import statements as sql
from deployments.queue.database import Database

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0  # a change whose bell was lost is seen after so long


class Feed:
    """One read for all who watch. It begins with the first of them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._task: asyncio.Task[None] | None = None

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    @property
    def is_watched(self) -> bool:
        return bool(self._watchers)

    @contextmanager
    def watched(self, request_id: str) -> Iterator[asyncio.Event]:
        """An event that is set now, and again with each change of the request."""
        if self._task is None or self._task.done():
            # in a clean context: it outlives the request that first watched
            run = self._run()
            self._task = asyncio.get_running_loop().create_task(run, context=contextvars.Context())
        changed = asyncio.Event()
        changed.set()
        self._watchers[request_id].add(changed)
        try:
            yield changed
        finally:
            self._watchers[request_id].discard(changed)
            if not self._watchers[request_id]:
                del self._watchers[request_id]

    async def _run(self) -> None:
        last: int | None = None
        while True:
            try:
                if last is None:  # whoever watches already may have read before
                    last, changed = await self._database.read(_newest), set(self._watchers)
                else:
                    last, changed = await self._database.read(_changes_since(last))
            except Exception:
                logger.exception("the change feed could not be read")
                changed = set(self._watchers)
            for request_id in changed:
                for watcher in self._watchers.get(request_id, ()):
                    watcher.set()
            await self._database.changed(LOOK_AGAIN_S)


def _newest(connection: Connection) -> int:
    """The newest event's seq, 0 when there is none."""
    return int(connection.execute(sql.NEWEST).scalar_one())


def _changes_since(after: int) -> Callable[[Connection], tuple[int, set[str]]]:
    """The newest event's seq, and the requests with events above `after`."""

    def operation(connection: Connection) -> tuple[int, set[str]]:
        found = connection.execute(sql.CHANGES, {"after": after}).all()
        return max((seq for seq, _ in found), default=after), {name for _, name in found}

    return operation
