"""What is PostgreSQL's own: connections and servers that are lost and come back, what sessions promise."""

import asyncio
import logging
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Connection, text

from deployments.queue import Queue, open_database, open_queue, postgres
from deployments.queue.listener import Listener
from deployments.queue.postgres import PostgresDatabase
from schemas.errors import QueueFull, StoreDown
from schemas.jobs import State
from schemas.settings import LeaseSettings
from tests.support.databases import LIMIT_S, grouped, note, noted
from tests.support.jobs import make_job
from tests.support.postgres import PostgresServer, postgres_at_work


@pytest.fixture
async def database(postgres_url: str) -> AsyncIterator[PostgresDatabase]:
    database = PostgresDatabase(postgres_url)
    yield database
    await database.close()


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """One that may be stopped."""
    with postgres_at_work() as server:
        yield server


def shown(*names: str) -> Any:
    return lambda connection: [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names]


def own_pid(connection: Connection) -> int:
    return int(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())


def kill_sessions(connection: Connection) -> None:
    """Every other connection to this database."""
    connection.exec_driver_sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


async def test_commits_are_synced_and_views_are_consistent(database: PostgresDatabase) -> None:
    names = ("synchronous_commit", "transaction_isolation", "transaction_read_only")
    assert await database.write(shown(*names)) == ["on", "read committed", "off"]
    assert await database.read(shown(*names)) == ["on", "repeatable read", "on"]


async def test_an_url_that_says_nothing_leaves_it_to_libpqs_environment(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = conninfo_to_dict(postgres_url)
    for name in ("host", "port", "user", "password", "dbname"):
        if name in said:
            monkeypatch.setenv({"dbname": "PGDATABASE"}.get(name, f"PG{name.upper()}"), str(said[name]))
    database = PostgresDatabase("postgresql:///")
    await database.write(note("1"))
    assert await database.read(noted) == ["1"]
    await database.close()


async def test_no_session_waits_for_ever(database: PostgresDatabase) -> None:
    names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
    for found in (await database.write(shown(*names)), await database.read(shown(*names))):
        assert "0" not in found


async def test_a_connection_lost_between_transactions_costs_nothing(database: PostgresDatabase) -> None:
    await database.write(note("1"))
    assert await database.read(noted) == ["1"]
    await database.write(kill_sessions)  # the readers'
    assert await database.read(noted) == ["1"]
    await database.read(kill_sessions)  # the writer's
    await database.write(note("2"))
    assert await database.read(noted) == ["1", "2"]


async def test_a_transaction_whose_connection_is_lost_runs_again_from_the_start(
    database: PostgresDatabase,
) -> None:
    pids: list[int] = []

    def loses_its_first_connection(connection: Connection) -> None:
        note("first half")(connection)
        pids.append(own_pid(connection))
        if len(pids) == 1:
            connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        note("second half")(connection)

    await database.write(loses_its_first_connection)
    assert len(set(pids)) == 2
    assert await database.read(noted) == ["first half", "second half"]


async def test_a_connection_lost_again_and_again_is_a_store_that_is_down(database: PostgresDatabase) -> None:
    def loses_its_connection(connection: Connection) -> None:
        note("lost")(connection)
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    def reads_no_more(connection: Connection) -> None:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(StoreDown):
        await asyncio.wait_for(database.write(loses_its_connection), LIMIT_S)
    with pytest.raises(StoreDown):
        await asyncio.wait_for(database.read(reads_no_more), LIMIT_S)
    assert database.is_alive
    await database.write(note("kept"))
    assert await database.read(noted) == ["kept"]


async def test_who_shares_a_group_with_what_ends_every_connection_is_told_so(
    database: PostgresDatabase,
) -> None:
    def fails(connection: Connection) -> None:
        raise QueueFull("no room")

    def loses_its_connection(connection: Connection) -> None:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    async with grouped(database) as group:
        outcomes = group(note("lost"), fails, loses_its_connection)
    assert [type(each) for each in await outcomes()] == [StoreDown] * 3
    await database.write(note("kept"))
    assert await database.read(noted) == ["kept"]


async def test_a_commit_whose_answer_is_lost_is_not_repeated(database: PostgresDatabase) -> None:
    """A trigger that runs at the commit ends the session: the caller cannot know what came of it."""
    runs: list[int] = []

    def dies_at_its_commit(connection: Connection) -> None:
        runs.append(1)
        connection.exec_driver_sql(
            "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"
        )
        connection.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON events DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION die()"
        )
        note("unknown")(connection)

    async with grouped(database) as group:
        outcomes = group(dies_at_its_commit, note("unknown as well"))
    for outcome in await asyncio.wait_for(outcomes(), LIMIT_S):
        assert isinstance(outcome, StoreDown)
    assert len(runs) == 1
    assert await database.read(noted) == []


async def test_a_deadlock_runs_again(database: PostgresDatabase, postgres_url: str) -> None:
    """With a transaction of somebody's who takes the same locks the other way round."""
    runs: list[int] = []
    held, wanted = threading.Event(), threading.Event()

    def ours(connection: Connection) -> None:
        runs.append(1)
        connection.exec_driver_sql("SET LOCAL deadlock_timeout = '10ms'")
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(1)")
        held.set()
        assert wanted.wait(LIMIT_S)
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(2)")
        note("done")(connection)

    def theirs(connection: Connection) -> None:
        connection.exec_driver_sql("SET LOCAL deadlock_timeout = '60s'")  # so that ours is the victim
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(2)")
        assert held.wait(LIMIT_S)
        wanted.set()
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(1)")

    other = PostgresDatabase(postgres_url)
    await asyncio.gather(database.write(ours), other.read(theirs))
    assert len(runs) == 2
    assert await database.read(noted) == ["done"]
    await other.close()


async def test_another_writer_that_does_not_end_is_a_store_that_is_down_not_a_hang(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = PostgresDatabase(postgres_url)
    monkeypatch.setattr(
        postgres, "SESSION", postgres.SESSION.replace("lock_timeout = '15s'", "lock_timeout = 50")
    )
    database = PostgresDatabase(postgres_url)
    assert await database.read(shown("lock_timeout")) == ["50ms"]
    async with grouped(holder):
        with pytest.raises(StoreDown):
            await asyncio.wait_for(database.write(note("in vain")), LIMIT_S)
    await database.write(note("kept"))
    assert await database.read(noted) == ["kept"]
    for each in (holder, database):
        await each.close()


async def test_a_writer_that_stands_still_loses_its_transaction(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was stopped, or its network went: the others go on."""
    monkeypatch.setattr(postgres, "SESSION", postgres.SESSION.replace("timeout = '10s'", "timeout = 50"))
    frozen = PostgresDatabase(postgres_url)
    assert await frozen.write(shown("idle_in_transaction_session_timeout")) == ["50ms"]
    monkeypatch.undo()
    database = PostgresDatabase(postgres_url)
    async with grouped(frozen):
        await asyncio.wait_for(database.write(note("kept")), LIMIT_S)
    assert await database.read(noted) == ["kept"]
    for each in (frozen, database):
        await each.close()


@pytest.mark.parametrize("verb", ["read", "write"])
async def test_f12_a_damaged_page_is_a_store_that_is_down(database: PostgresDatabase, verb: str) -> None:
    """As PostgreSQL says it of a page whose checksum is wrong."""
    damage = "DO $$ BEGIN RAISE EXCEPTION 'invalid page in block 7' USING ERRCODE = 'data_corrupted'; END $$"
    with pytest.raises(StoreDown) as raised:
        await getattr(database, verb)(lambda connection: connection.exec_driver_sql(damage))
    assert "invalid page" in str(raised.value.__cause__)
    assert await database.read(shown("transaction_read_only")) == ["on"]


async def test_a_server_that_takes_no_writes_is_down_until_another_does(
    postgres: PostgresServer, postgres_url: str, database: PostgresDatabase
) -> None:
    """As a standby that an address led to, or a disk that its provider has closed before it was full."""
    name = conninfo_to_dict(postgres_url)["dbname"]
    await database.write(note("one"))
    postgres.run(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    postgres.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    with pytest.raises(StoreDown):
        await database.write(note("lost"))
    assert await database.read(noted) == ["one"]
    postgres.run(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
    await database.write(note("two"))  # on a new connection: the old one never would
    assert await database.read(noted) == ["one", "two"]


@pytest.mark.parametrize("immediately", [False, True], ids=["in order", "as in a crash"])
async def test_a_server_that_stops_is_down_until_it_starts_again(
    own_server: PostgresServer, immediately: bool
) -> None:
    queue = open_queue(own_server.new_database(), LeaseSettings())
    job = make_job()
    await queue.submit(job)
    own_server.stop(immediately=immediately)
    for attempt in (
        queue.submit(make_job()),
        queue.get(job.request_id, job.tenant),
        queue.submit(make_job()),
        queue.claim("flux", "one", 1),
    ):
        with pytest.raises(StoreDown):
            await asyncio.wait_for(attempt, LIMIT_S)
    assert queue.is_alive
    own_server.start()
    [claim] = await queue.claim("flux", "one", 9)
    assert claim.job == job
    await queue.close()


async def test_a_watcher_hears_again_after_the_server_has_been_away(own_server: PostgresServer) -> None:
    url = own_server.new_database()
    watching, other = open_queue(url, LeaseSettings()), open_queue(url, LeaseSettings())
    job = make_job()
    await other.submit(job)
    watcher = watching.watch(job.request_id, job.tenant)
    await anext(watcher)
    own_server.stop()
    own_server.start()
    await other.cancel(job.request_id, job.tenant)
    last = await asyncio.wait_for(anext(watcher), LIMIT_S)
    assert last.record.state == State.COMPLETED
    for queue in (watching, other):
        await queue.close()


async def test_the_listener_connects_anew(database: PostgresDatabase, postgres_url: str) -> None:
    await asyncio.wait_for(database.changed(LIMIT_S), LIMIT_S / 2)  # it listens
    other = PostgresDatabase(postgres_url)
    await other.read(kill_sessions)
    await asyncio.wait_for(database.changed(LIMIT_S), LIMIT_S / 2)  # and again
    heard = asyncio.create_task(database.changed(LIMIT_S))
    await other.write(note("news"))
    await asyncio.wait_for(heard, LIMIT_S / 2)
    await other.close()


async def test_nothing_is_accepted_by_an_opening_that_cannot_connect(tmp_path: Any) -> None:
    with pytest.raises(StoreDown):
        open_database(f"postgresql://me@/nothing?host={tmp_path}")


async def test_passwords_are_in_no_error_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for url in ("postgres://me:s3cret@there/db", "postgresql://me:s3cret@127.0.0.1:1/db"):
        with pytest.raises((ValueError, StoreDown)) as caught:
            open_database(url)
        assert "s3cret" not in f"{caught.value} {caught.value.__cause__} {caplog.text}"


async def test_what_callers_sent_is_not_in_the_log(
    database: PostgresDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(connection: Connection) -> None:
        connection.execute(text("SELECT :words FROM nowhere"), {"words": "private"})

    with pytest.raises(Exception) as caught:
        await database.write(fails)
    assert "private" not in str(caught.value) + caplog.text


async def test_a_closed_database_refuses_instead_of_hanging(postgres_url: str) -> None:
    queue = Queue(PostgresDatabase(postgres_url), LeaseSettings())
    await queue.close()
    with pytest.raises(StoreDown):
        await asyncio.wait_for(queue.submit(make_job()), LIMIT_S)


async def test_a_server_that_stays_away_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = asyncio.Semaphore(0)

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        calls.release()

    monkeypatch.setattr("deployments.queue.listener.RECONNECT_S", 0.0)
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path must be short
    async with await asyncio.start_unix_server(hang_up, folder / ".s.PGSQL.5432"):
        listener = Listener({"host": str(folder), "port": 5432})
        for _ in range(4):
            await asyncio.wait_for(calls.acquire(), LIMIT_S)
        await listener.close()
    shutil.rmtree(folder)
    assert len([each for each in caplog.records if "not heard of" in each.message]) == 1
