"""What is SQLite's own: that a commit is on disk, and that processes hear of each other."""

import asyncio
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert
from sqlalchemy.exc import OperationalError, ProgrammingError

from deployments.queue import feed, open_queue
from deployments.queue.doorbell import Doorbell
from deployments.queue.sqlite import READERS, SqliteDatabase
from deployments.queue.tables import events
from schemas.errors import StoreDown
from schemas.jobs import State
from schemas.settings import LeaseSettings
from tests.faults import disks
from tests.support.databases import LIMIT_S, grouped, note, noted
from tests.support.jobs import make_job

ROW = {"kind": "state", "at": 1.0, "payload": None}


def pragmas(connection: Connection) -> list[object]:
    names = ("journal_mode", "synchronous")
    return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]


async def test_every_connection_writes_ahead_and_syncs_each_commit(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "queue.sqlite3")
    assert await database.write(pragmas) == ["wal", 2]  # 2 is FULL
    assert await database.read(pragmas) == ["wal", 2]
    await database.close()


def submit_until_killed(folder: str, acknowledged: "multiprocessing.connection.Connection") -> None:
    async def run() -> None:
        queue = open_queue(f"sqlite:///{folder}/queue.sqlite3", LeaseSettings())
        while True:
            jobs = [make_job() for _ in range(8)]
            await asyncio.gather(*(queue.submit(job) for job in jobs))
            acknowledged.send([job.request_id for job in jobs])

    asyncio.run(run())


async def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=submit_until_killed, args=(str(tmp_path), theirs))
    process.start()
    theirs.close()
    acknowledged: list[str] = []
    while len(acknowledged) < 400:
        acknowledged += await asyncio.to_thread(ours.recv)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while ours.poll():
        try:
            acknowledged += ours.recv()
        except EOFError:
            break
    queue = open_queue(f"sqlite:///{tmp_path}/queue.sqlite3", LeaseSettings())
    for request_id in acknowledged:
        record = await queue.get(request_id, "public")
        assert record is not None
        assert record.state == State.QUEUED
    await queue.close()


async def test_a_commit_rings_at_another_process_bell(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    database = SqliteDatabase(path)
    other = Doorbell(path)  # as another process has it
    await database.write(lambda connection: connection.exec_driver_sql("SELECT 1").scalar())
    await asyncio.wait_for(other.wait(60), 10)
    other.close()
    await database.close()


async def test_the_bell_of_a_dead_process_is_cleared_away(tmp_path: Path) -> None:
    living, dead = Doorbell(tmp_path / "q"), Doorbell(tmp_path / "q")
    path = dead._path
    asyncio.get_running_loop().remove_reader(dead._socket)
    dead._socket.close()  # without saying goodbye
    living.ring()
    assert not path.exists()
    living.close()


async def test_a_bell_that_cannot_be_rung_stops_no_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = SqliteDatabase(tmp_path / "queue.sqlite3")

    def no_more_files(self: Doorbell) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Doorbell, "ring", no_more_files)
    for _ in range(2):
        assert await asyncio.wait_for(database.write(pragmas), 10) == ["wal", 2]
    assert database.is_alive
    await database.close()


async def test_a_closed_database_refuses_instead_of_hanging(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "queue.sqlite3")
    await database.close()
    with pytest.raises(StoreDown):
        await asyncio.wait_for(database.write(pragmas), 10)


async def test_a_failing_disk_is_a_store_that_is_down(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "queue.sqlite3")

    def full(connection: Connection) -> None:
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    with pytest.raises(StoreDown):
        await database.write(full)
    with pytest.raises(StoreDown):
        await database.read(full)
    assert await database.write(pragmas) == ["wal", 2]
    await database.close()


@pytest.mark.parametrize("size", [1, 10_000_000], ids=["small", "large"])
async def test_where_a_disk_is_full_nothing_of_a_shared_commit_is_told_and_lost(
    tmp_path: Path, size: int
) -> None:
    """SQLite may undo the whole transaction then, and what came before the one that was too large with it."""
    database = SqliteDatabase(tmp_path / "queue.sqlite3")

    def fills(connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count=1")  # as many as it has
        while True:
            connection.execute(insert(events), {**ROW, "request_id": "x" * size})

    async with grouped(database) as group:
        outcomes = group(note("1"), fills, note("2"))
    told = await outcomes()
    assert isinstance(told[1], StoreDown)
    assert "disk is full" in str(told[1].__cause__)
    kept = [name for name, each in zip(("1", "", "2"), told, strict=True) if not isinstance(each, Exception)]
    assert await database.read(noted) == kept
    await database.write(note("3"))  # there is room again
    assert await database.read(noted) == [*kept, "3"]
    await database.close()


async def test_a_database_that_cannot_be_read_is_a_store_that_is_down(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "queue.sqlite3")
    together = threading.Barrier(READERS)
    await asyncio.gather(*(database.read(lambda _: together.wait(LIMIT_S)) for _ in range(READERS)))
    await database.write(note("kept"))  # which no reader has in its memory
    with disks.unreadable(tmp_path / "queue.sqlite3-wal"):
        for _ in range(2):
            with pytest.raises(StoreDown, match="try again"):
                await database.read(noted)
    assert await database.read(noted) == ["kept"]
    await database.close()


async def test_what_is_wrong_with_an_operation_is_no_fault_of_the_database(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "queue.sqlite3")

    def asks_too_little(connection: Connection) -> None:
        connection.exec_driver_sql("SELECT ?")

    for run in (database.read, database.write):
        with pytest.raises(ProgrammingError):
            await run(asks_too_little)
    await database.close()


async def test_watchers_outlive_a_feed_that_could_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = open_queue(f"sqlite:///{tmp_path}/queue.sqlite3", LeaseSettings())
    job = make_job()
    await queue.submit(job)
    failures = [OSError("no more files")]
    newest = feed._newest

    def fails_at_first(connection: Connection) -> int:
        if failures:
            raise failures.pop()
        return newest(connection)

    monkeypatch.setattr(feed, "_newest", fails_at_first)
    watcher = queue.watch(job.request_id, job.tenant)
    await anext(watcher)
    await queue.cancel(job.request_id, job.tenant)
    last = await asyncio.wait_for(anext(watcher), 10)
    assert last.record.state == State.COMPLETED
    assert not failures
    await queue.close()


async def test_a_url_of_another_kind_is_refused_with_its_name(tmp_path: Path) -> None:
    try:
        open_queue("mysql://x", LeaseSettings())
    except ValueError as error:
        assert "mysql://x" in str(error)
    else:
        raise AssertionError("it was opened")


async def test_a_bells_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    bell = Doorbell(tmp_path / "q")
    bell.close()
    bell._folder.chmod(0o755)
    with pytest.raises(PermissionError, match="alone"):
        Doorbell(tmp_path / "q")
    bell._folder.rmdir()


async def test_a_bell_is_heard_however_often_and_whatever_is_rung(tmp_path: Path) -> None:
    ringing, hearing = Doorbell(tmp_path / "q"), Doorbell(tmp_path / "q")
    ringing._socket.sendto(b"", str(hearing._path))
    await asyncio.wait_for(hearing.wait(60), 10)
    for _ in range(3000):  # more than a socket keeps; nobody listens meanwhile
        ringing.ring()
    await asyncio.wait_for(hearing.wait(60), 10)
    ringing.close()
    hearing.close()
