"""SQLite as the queue's database: one file on a local disk, WAL, every commit synced.

`synchronous=FULL` puts a commit on disk before it is acknowledged; in WAL mode NORMAL does not.
"""

import asyncio
import logging
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError

from deployments import crash
from deployments.queue import migrations
from deployments.queue.database import Database, Operation, down
from deployments.queue.doorbell import Doorbell
from deployments.queue.writer import GroupWriter

logger = logging.getLogger(__name__)

T = TypeVar("T")

BUSY_TIMEOUT_S = 30  # how long a transaction waits for another process's
READERS = 4  # threads


class SqliteDatabase(Database):
    """One writer thread that commits in groups, a few reader threads with their own connections."""

    def __init__(self, path: Path) -> None:
        migrate(path)
        self._engine = _open(path)
        self._bell = Doorbell(path)
        self._writer = GroupWriter(self._transact, _explain)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="queue-reader")
        self._thread = threading.local()

    @property
    def is_alive(self) -> bool:
        return self._writer.is_alive

    async def write(self, operation: Operation[T]) -> T:
        return await self._writer.write(operation)

    async def read(self, operation: Operation[T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._readers, self._read, operation)
        except (DatabaseError, OSError) as error:
            if _is_failure(error):
                raise down(error) from error
            raise

    async def changed(self, timeout_s: float) -> None:
        await self._bell.wait(timeout_s)

    def wake(self) -> None:
        self._bell.wake()

    async def close(self) -> None:
        await self._writer.close()
        await asyncio.to_thread(self._readers.shutdown)
        self._bell.close()
        self._engine.dispose()

    def _read(self, operation: Operation[T]) -> T:
        connection: Connection | None = getattr(self._thread, "connection", None)
        if connection is None:
            connection = self._engine.connect().execution_options(read_only=True)
            with connection.begin():
                connection.exec_driver_sql("PRAGMA query_only=ON")
            self._thread.connection = connection
        with connection.begin():
            return operation(connection)

    def _transact(self, work: Operation[T]) -> T:
        with self._engine.begin() as connection:
            result = work(connection)
        crash.point("sqlite.committed")
        try:
            self._bell.ring()
        except OSError:  # the others look by themselves after a moment
            logger.warning("the other processes could not be told of a commit", exc_info=True)
        return result


def migrate(path: Path, to: str = "head") -> migrations.Move:
    """Bring the schema to a revision, in one transaction; the file is made when absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = _open(path)
    try:
        with engine.begin() as connection:
            moved = migrations.move(connection, to)
            crash.point("sqlite.moved")
        crash.point("sqlite.migrated")
        return moved
    finally:
        engine.dispose()


def _explain(error: Exception) -> Exception:
    return down(error) if _is_failure(error) else error


def _is_failure(error: Exception) -> bool:
    """Of the database, and not of an operation. Of a disk that cannot be read SQLite says, in an error of no
    kind, that the "database disk image is malformed"."""
    return isinstance(error, OperationalError | OSError) or type(error) is DatabaseError


def _open(path: Path) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        hide_parameters=True,  # they are the callers' own
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

    event.listen(engine, "handle_error", _notice_undone)
    return engine


def _notice_undone(context: ExceptionContext) -> None:
    """Where a disk is full or fails, SQLite may undo the whole transaction and not one statement of it. Then
    nothing more may be done in it, nor what was done before be taken for kept: as with a lost connection."""
    connection = context.connection
    if connection is None or connection.get_execution_options().get("read_only", False):
        return
    if not connection.connection.in_transaction:
        context.is_disconnect, context.invalidate_pool_on_disconnect = True, False
