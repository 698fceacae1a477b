"""SQLite as the queue's database: one file on a local disk, WAL, every commit synced.

`synchronous=FULL` puts a commit on disk before it is acknowledged; in WAL mode NORMAL does not.
A sync costs milliseconds, so the operations that wait while one runs share the next (group commit).
"""

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.exc import OperationalError
from sqlalchemy.schema import CreateColumn

from deployments.queue.database import Database, Operation
from deployments.queue.doorbell import Doorbell
from deployments.queue.tables import metadata
from schemas.errors import StoreDown

logger = logging.getLogger(__name__)

T = TypeVar("T")
Pending = tuple[Operation[Any], Future[Any]]

BUSY_TIMEOUT_S = 30  # how long a transaction waits for another process's
GROUP_LIMIT = 256  # operations in one commit
READERS = 4  # threads


class SqliteDatabase(Database):
    """One writer thread that commits in groups, a few reader threads with their own connections."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = _open(path)
        self._bell = Doorbell(path)
        self._pending: SimpleQueue[Pending | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write_groups, name="queue-writer", daemon=True)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="queue-reader")
        self._thread = threading.local()
        with self._engine.begin() as connection:
            _prepare_tables(connection)
        self._writer.start()

    @property
    def is_alive(self) -> bool:
        return self._writer.is_alive()

    async def write(self, operation: Operation[T]) -> T:
        if not self.is_alive:
            raise StoreDown("The queue is closed.")
        done: Future[T] = Future()
        self._pending.put((operation, done))
        return await asyncio.wrap_future(done)

    async def read(self, operation: Operation[T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._readers, self._read, operation)
        except (OperationalError, OSError) as error:
            raise _down(error) from error

    async def changed(self, timeout_s: float) -> None:
        await self._bell.wait(timeout_s)

    def wake(self) -> None:
        self._bell.wake()

    async def close(self) -> None:
        self._pending.put(None)
        await asyncio.to_thread(self._writer.join)
        await asyncio.to_thread(self._readers.shutdown)
        self._bell.close()
        self._engine.dispose()

    def _read(self, operation: Operation[T]) -> T:
        connection: Connection | None = getattr(self._thread, "connection", None)
        if connection is None:
            connection = self._engine.connect().execution_options(read_only=True)
            self._thread.connection = connection
        with connection.begin():
            return operation(connection)

    def _write_groups(self) -> None:
        with self._engine.connect() as connection:
            while group := self._next_group():
                self._commit(connection, group)

    def _next_group(self) -> list[Pending]:
        """What waits now, at least one; empty at the end."""
        first = self._pending.get()
        group = [] if first is None else [first]
        while group and len(group) < GROUP_LIMIT:
            try:
                following = self._pending.get_nowait()
            except Empty:
                break
            if following is None:
                self._pending.put(None)  # the end comes after this group
                break
            group.append(following)
        return group

    def _commit(self, connection: Connection, group: Sequence[Pending]) -> None:
        """One transaction for the group. If an operation raises, each gets a transaction of its own."""
        try:
            with connection.begin():
                results = [operation(connection) for operation, _ in group]
        except Exception as error:  # noqa: BLE001 - the top of the writer's loop; the caller gets it
            if len(group) == 1:
                is_down = isinstance(error, OperationalError | OSError)
                _settle(group[0][1], error=_down(error) if is_down else error)
                return
            for pending in group:
                self._commit(connection, [pending])
            return
        for (_, done), result in zip(group, results, strict=True):
            _settle(done, result)
        try:
            self._bell.ring()
        except OSError:  # the others look by themselves after a moment
            logger.warning("the other processes could not be told of a commit", exc_info=True)


def _settle(done: "Future[Any]", result: Any = None, error: Exception | None = None) -> None:
    if not done.set_running_or_notify_cancel():
        return  # its caller has gone
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)


def _down(error: Exception) -> StoreDown:
    logger.error("the queue's database failed: %s", error)
    return StoreDown("The queue cannot be reached at this moment; try again.")


def _prepare_tables(connection: Connection) -> None:
    """Make the tables, and what an older version's file lacks of them.

    So a column that comes later must have a server default or may be null.
    """
    metadata.create_all(connection)
    for table in metadata.sorted_tables:
        there = {column["name"] for column in inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                specification = CreateColumn(column).compile(connection)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {specification}")
        for index in table.indexes:
            index.create(connection, checkfirst=True)


def _open(path: Path) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
        pool_size=READERS + 2,
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say, below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        read_only = connection.get_execution_options().get("read_only", False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine
