"""What a database promises to the queue, on every store."""

import asyncio
import multiprocessing
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing.connection import Connection as Pipe

import pytest
from sqlalchemy import Connection, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from deployments.queue import Queue, open_database, open_queue
from deployments.queue.database import Database
from deployments.queue.feed import _changes_since
from deployments.queue.postgres import PostgresDatabase
from deployments.queue.tables import events, requests
from schemas.errors import QueueFull, StoreDown
from schemas.jobs import JobResult, Logged, Once, State
from schemas.settings import LeaseSettings
from tests.support.databases import LIMIT_S, grouped, note, noted
from tests.support.jobs import make_job


@pytest.fixture
async def database(queue_url: str) -> AsyncIterator[Database]:
    database = open_database(queue_url)
    yield database
    await database.close()


async def test_every_kind_of_value_comes_back_as_it_was(queue: Queue) -> None:
    odd = {
        "true": True,
        "null": None,
        "whole": 2**62,
        "large": 2**80,
        "float": 0.1 + 0.2,
        "tiny": 5e-324,
        "words": "ünï ☂ 🦊 \\u0000 ' \" %s :name \u2028",
        "": [[], {}, [None, False, 0, 0.0, ""]],
    }
    job = make_job(input=odd, tags=("é", ":x", "%s"), keep_s=2**40, max_retries=0, start_timeout_s=0.1)
    await queue.submit(job, [Logged("100 % ☂ 'quoted'")])
    [claim] = await queue.claim("flux", "one", 1)
    assert claim.job == job
    assert repr(claim.job.input) == repr(odd)  # True is not 1, nor 0.0 0
    result = JobResult(200, odd, "☂", None, retryable=True, inference_s=1e-9)
    await queue.finish(claim, result)
    record = await queue.get(job.request_id, job.tenant)
    assert record is not None
    assert record.result == result
    [event] = await queue.events(job.request_id)
    assert event.event == Logged("100 % ☂ 'quoted'")


async def test_a_large_input_and_output_come_back_as_they_were(queue: Queue) -> None:
    large = {"text": "☂" * 1_500_000, "list": list(range(300_000))}  # more than 10 MB, as it is written
    job = make_job(input=large)
    await queue.submit(job)
    [claim] = await queue.claim("flux", "one", 1)
    assert claim.job.input == large
    await queue.finish(claim, JobResult.success(large, 0.5))
    record = await queue.get(job.request_id, job.tenant)
    assert record is not None and record.result is not None
    assert record.result.body == large


async def test_an_error_may_say_anything(queue: Queue) -> None:
    await queue.submit(make_job())
    [claim] = await queue.claim("flux", "one", 1)
    assert await queue.finish(claim, JobResult(500, {"detail": "a\0b"}, "a\0b", "internal"))
    record = await queue.get(claim.job.request_id, "public")
    assert record is not None and record.result is not None
    assert record.result.body == {"detail": "a\0b"}
    assert record.result.error in ("a\0b", "a\ufffdb")


async def test_a_view_stays_as_it_was_while_others_write(database: Database) -> None:
    loop = asyncio.get_running_loop()

    def look_twice(connection: Connection) -> tuple[list[str], list[str]]:
        before = noted(connection)
        asyncio.run_coroutine_threadsafe(database.write(note("new")), loop).result(LIMIT_S)
        return before, noted(connection)

    assert await database.read(look_twice) == ([], [])
    assert await database.read(noted) == ["new"]


async def test_a_view_cannot_be_written(database: Database) -> None:
    with pytest.raises((StoreDown, DBAPIError)):
        await database.read(note("written by a reader"))
    await database.write(note("written"))
    assert await database.read(noted) == ["written"]


async def test_what_fails_in_a_group_fails_alone(database: Database) -> None:
    def fails(connection: Connection) -> None:
        note("lost")(connection)
        raise QueueFull("no room")

    def is_refused(connection: Connection) -> None:
        note("lost as well")(connection)
        twice = {"seq": 2**20, "request_id": "lost", "kind": "state", "at": 0.0}
        connection.execute(insert(events), [twice, twice])

    async with grouped(database) as group:
        outcomes = group(note("1"), fails, note("2"), is_refused, note("3"))
    first, error, second, refusal, third = await outcomes()
    assert [type(each) for each in (error, refusal)] == [QueueFull, IntegrityError]
    assert not any(isinstance(each, Exception) for each in (first, second, third))
    assert await database.read(noted) == ["1", "2", "3"]


async def test_claims_of_two_dispatchers_never_overlap(queue: Queue, queue_url: str) -> None:
    other = Queue(open_database(queue_url), LeaseSettings(), clock=queue.now)
    jobs = [make_job() for _ in range(60)]
    await asyncio.gather(*(queue.submit(job) for job in jobs))
    found = await asyncio.gather(*(each.claim("flux", "x", 3) for _ in range(15) for each in (queue, other)))
    ids = [claim.job.request_id for claims in found for claim in claims]
    assert sorted(ids) == sorted(job.request_id for job in jobs)
    await other.close()


async def test_one_key_is_one_request_however_many_gateways_take_it(queue: Queue, queue_url: str) -> None:
    other = Queue(open_database(queue_url), LeaseSettings(), clock=queue.now)
    once = Once("key", "print")
    receipts = await asyncio.gather(
        *(each.submit(make_job(), once=once) for _ in range(10) for each in (queue, other))
    )
    assert len({receipt.request_id for receipt in receipts}) == 1
    assert sum(not receipt.replayed for receipt in receipts) == 1
    await other.close()


async def test_an_end_is_never_overwritten_by_a_cancel_elsewhere(queue: Queue, queue_url: str) -> None:
    other = Queue(open_database(queue_url), LeaseSettings(), clock=queue.now)
    for _ in range(20):
        job = make_job(webhook_url="https://there.example")
        await queue.submit(job)

        async def run() -> bool:
            claims = await queue.claim("flux", "one", 1)
            return bool(claims) and await queue.finish(claims[0], JobResult.success({}, 0.5))

        has_finished, _ = await asyncio.gather(run(), other.cancel(job.request_id, job.tenant))
        record = await queue.get(job.request_id, job.tenant)
        assert record is not None
        if has_finished:  # with its output, or as cancelled meanwhile
            assert record.result is not None
        assert record.state == (State.COMPLETED if has_finished or record.result else State.QUEUED)
    await other.close()


async def test_nothing_of_a_refused_submit_stays(queue: Queue) -> None:
    await queue.submit(make_job())
    outcomes = await asyncio.gather(
        *(queue.submit(make_job(), [Logged("x")], max_ahead=n % 2 * 100) for n in range(10)),
        return_exceptions=True,
    )
    refused = [each for each in outcomes if isinstance(each, QueueFull)]
    assert len(refused) == 5
    count = await queue._database.read(lambda c: len(c.execute(select(requests.c.seq)).all()))
    assert count == 6
    assert len(await queue._database.read(noted)) == 5


async def test_the_feed_misses_nothing_of_transactions_that_overlap(
    database: Database, queue_url: str
) -> None:
    """The first takes the lower number, and would commit after the second if it could."""
    other = open_database(queue_url)
    began, gate = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        note("slow")(connection)
        began.set()
        assert gate.wait(LIMIT_S)

    first = asyncio.create_task(database.write(slow))
    await asyncio.to_thread(began.wait)
    second = asyncio.create_task(other.write(note("quick")))
    seen: set[str] = set()
    last = 0

    async def look() -> None:
        nonlocal last
        last, found = await database.read(_changes_since(last))
        seen.update(found)

    while not second.done() and not await waits_for_a_lock(database):
        await look()
    await look()
    gate.set()
    await asyncio.gather(first, second)
    await look()
    assert seen == {"slow", "quick"}
    await other.close()


async def waits_for_a_lock(database: Database) -> bool:
    def operation(connection: Connection) -> bool:
        if connection.dialect.name == "sqlite":
            return True  # only one can write
        return bool(connection.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar())

    return await database.read(operation)


async def test_a_commit_is_heard_in_another_opening_at_once(database: Database, queue_url: str) -> None:
    other = open_database(queue_url)
    await heard_at_once(other, lambda: database.write(note("news")))
    await other.close()


async def heard_at_once(listening: Database, ring: Callable[[], Awaitable[object]]) -> None:
    """`changed` returns for the ring, long before its time is over."""
    await listens(listening)
    heard = asyncio.create_task(listening.changed(2 * LIMIT_S))
    await ring()
    await asyncio.wait_for(heard, LIMIT_S)


async def listens(database: Database) -> None:
    """PostgreSQL's listener rings once by itself, when it is connected."""
    if isinstance(database, PostgresDatabase):
        await asyncio.wait_for(database.changed(2 * LIMIT_S), LIMIT_S)


def submit_elsewhere(url: str, told: Pipe) -> None:
    async def run() -> None:
        queue = open_queue(url, LeaseSettings())
        await asyncio.to_thread(told.recv)
        await queue.submit(make_job())
        await queue.close()

    asyncio.run(run())


async def test_a_commit_of_another_process_is_heard_at_once(database: Database, queue_url: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=submit_elsewhere, args=(queue_url, theirs))
    process.start()

    async def ring() -> None:
        ours.send("now")

    await heard_at_once(database, ring)
    await asyncio.to_thread(process.join)
    assert process.exitcode == 0


async def test_a_process_does_not_hear_itself(database: Database) -> None:
    await listens(database)
    heard = asyncio.create_task(database.changed(2 * LIMIT_S))
    for number in range(5):
        await database.write(note(str(number)))
    assert not heard.done()
    database.wake()
    await asyncio.wait_for(heard, LIMIT_S)


async def test_what_waits_when_it_closes_is_written(queue_url: str) -> None:
    database = open_database(queue_url)
    async with grouped(database) as write:
        outcomes = write(note("a"), note("b"))
        await asyncio.sleep(0)  # both are in line
        closing = asyncio.create_task(database.close())
    assert not [each for each in await outcomes() if isinstance(each, Exception)]
    await closing
    again = open_database(queue_url)
    assert await again.read(noted) == ["a", "b"]
    await again.close()
