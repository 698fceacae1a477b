"""PostgreSQL as the queue's database: for several nodes, with backups and replicas of its own.

All writing transactions, of all processes, run one after another under one advisory lock, as SQLite's do.
So every operation sees all that was committed before it, the order of acceptance is that of `seq`, and the
feed of events misses none: a lower `seq` never commits after a higher one. What waits for the lock shares
the next commit.

A commit whose answer was lost may have happened: its callers get StoreDown as well.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import psycopg
from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import NullPool

from deployments import crash
from deployments.queue import migrations
from deployments.queue.database import Database, Operation, down
from deployments.queue.listener import CHANNEL, Listener
from deployments.queue.writer import GroupWriter

T = TypeVar("T")

TRIES = 3  # of a transaction that another one or a lost connection undid
READERS = 4  # threads
TAKES_NO_WRITES = "25006"  # SQLSTATE of a standby's refusal
WRITING, MIGRATING = 0x6461726B01, 0x6461726B02  # advisory locks

# A server or a network that has gone is noticed within seconds.
CONNECTION = {
    "application_name": "darkroom",
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# No transaction waits, or keeps the others waiting, for ever; who waits outlasts who stands still.
SESSION = (
    "SET synchronous_commit = on; SET lock_timeout = '15s'; SET statement_timeout = '30s'; "
    "SET idle_in_transaction_session_timeout = '10s'"
)

LOCK = text(f"SELECT pg_advisory_xact_lock({WRITING})")
LOCK_MIGRATION = text(f"SELECT pg_advisory_xact_lock({MIGRATING})")
NOTIFY = text("SELECT pg_notify(:channel, :sender)")


class PostgresDatabase(Database):
    """One writer thread that commits in groups, a few reader threads, a listener for others' commits."""

    def __init__(self, url: str) -> None:
        migrate(url)
        self._engine = _open(url, pool_size=1)
        self._views = _open(url, read_only=True, pool_size=READERS)
        self._bell = Listener(_parameters(url))
        self._writer = GroupWriter(self._transact, _explain)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="queue-reader")

    @property
    def is_alive(self) -> bool:
        """Also while the server is down: connections are made anew by themselves."""
        return self._writer.is_alive

    async def write(self, operation: Operation[T]) -> T:
        return await self._writer.write(operation)

    async def read(self, operation: Operation[T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._readers, self._read, operation)
        except DBAPIError as error:
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
        await self._bell.close()
        self._engine.dispose()
        self._views.dispose()

    def _read(self, operation: Operation[T]) -> T:
        return self._try(self._views, operation, lambda connection: None)

    def _transact(self, work: Operation[T]) -> T:
        def transaction(connection: Connection) -> T:
            connection.execute(LOCK)
            crash.point("postgres.locked")
            result = work(connection)
            connection.execute(NOTIFY, {"channel": CHANNEL, "sender": self._bell.name})
            crash.point("postgres.notified")
            return result

        return self._try(self._engine, transaction, _commit)

    def _try(self, engine: Engine, work: Operation[T], end: Callable[[Connection], None]) -> T:
        """Run in a transaction; from the start once more where something passing undid it.

        Raises StoreDown where there is no connection, and what `work` or `end` raised.
        """
        for tries_left in reversed(range(TRIES)):
            with _connected(engine) as connection:
                try:
                    result = work(connection)
                except DBAPIError as error:
                    if tries_left and _may_pass(error):
                        continue  # nothing of it was committed
                    raise
                end(connection)
                crash.point("postgres.ended")
                return result
        raise AssertionError("the last try returns or raises")


def migrate(url: str, to: str = "head") -> migrations.Move:
    """Bring the schema to a revision, in one transaction that other processes' openings wait for.

    Raises StoreDown, and what `migrations.move` raises.
    """
    engine = create_engine(_with_driver(url), connect_args=_defaults(url), poolclass=NullPool)
    with _connected(engine) as connection:
        connection.execute(LOCK_MIGRATION)
        crash.point("postgres.migration_locked")
        moved = migrations.move(connection, to)
        crash.point("postgres.moved")
        _commit(connection)
        crash.point("postgres.migrated")
    return moved


def _connected(engine: Engine) -> Connection:
    try:
        return engine.connect()
    except (OperationalError, InterfaceError) as error:
        raise down(error) from error


def _commit(connection: Connection) -> None:
    try:
        connection.commit()
    except (OperationalError, InterfaceError) as error:
        raise down(error) from error


def _may_pass(error: DBAPIError) -> bool:
    """Whether a transaction that has not been committed may well succeed when it is run again."""
    passing = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)
    return error.connection_invalidated or isinstance(error.orig, passing)


def _explain(error: Exception) -> Exception:
    return down(error) if _is_failure(error) else error


def _is_failure(error: Exception) -> bool:
    """Of the database, and not of an operation. SQLSTATEs of class XX say that it finds itself damaged."""
    state = _state(getattr(error, "orig", None))
    return isinstance(error, OperationalError | InterfaceError) or state.startswith(("XX", TAKES_NO_WRITES))


def _state(error: BaseException | None) -> str:
    return getattr(error, "sqlstate", None) or ""


def _leave_a_standby(context: ExceptionContext) -> None:
    """A server that takes no writes is not the one that is wanted, perhaps not any more: connect anew."""
    if _state(context.original_exception) == TAKES_NO_WRITES:
        context.is_disconnect = True


def _open(url: str, *, pool_size: int, read_only: bool = False) -> Engine:
    engine = create_engine(
        _with_driver(url),
        connect_args=_defaults(url),
        pool_size=pool_size,
        max_overflow=0,
        hide_parameters=True,  # they are the callers' own
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: "psycopg.Connection[Any]", _: Any) -> None:
        connection.execute(SESSION)
        connection.commit()
        if read_only:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True

    event.listen(engine, "handle_error", _leave_a_standby)
    return engine


def _with_driver(url: str) -> URL:
    return make_url(url).set(drivername="postgresql+psycopg")


def _defaults(url: str) -> dict[str, Any]:
    """What the URL does not say about the connection."""
    return {name: value for name, value in CONNECTION.items() if name not in make_url(url).query}


def _parameters(url: str) -> dict[str, Any]:
    """The URL as the driver takes it."""
    full = _with_driver(url)
    _, said = full.get_dialect()().create_connect_args(full)
    return {**_defaults(url), **said}
