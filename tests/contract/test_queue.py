"""What the queue promises, on every store."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from deployments.queue import Queue, Setback, open_audit
from deployments.queue.queue import LEAD_S
from deployments.queue.tables import deliveries, metadata
from deployments.queue.upkeep import UNKEPT_S
from schemas.deliveries import MAX_URL_BYTES
from schemas.errors import BadRequest, KeyReused, QueueFull
from schemas.jobs import (
    CancelOutcome,
    Claim,
    Job,
    JobResult,
    Logged,
    Once,
    Previewed,
    Priority,
    Receipt,
    Snapshot,
    State,
)
from schemas.settings import Retention
from tests.contract.conftest import LEASE
from tests.support.jobs import OUTPUT, Clock, make_job

DONE = JobResult.success(OUTPUT, 0.5)


async def claim(queue: Queue, owner: str = "one", limit: int = 10) -> list[Claim]:
    return await queue.claim("flux", owner, limit)


async def only_claim(queue: Queue, owner: str = "one") -> Claim:
    [claimed] = await claim(queue, owner)
    return claimed


async def state(queue: Queue, job: Job) -> State:
    record = await queue.get(job.request_id, job.tenant)
    assert record is not None
    return record.state


async def result(queue: Queue, job: Job) -> JobResult:
    record = await queue.get(job.request_id, job.tenant)
    assert record is not None
    assert record.result is not None
    return record.result


async def test_a_job_comes_back_as_it_was_submitted(queue: Queue) -> None:
    job = make_job(
        input={"prompt": "ünï ☂", "seed": 2**62, "guidance_scale": 3.25},
        tenant="alice",
        priority=Priority.LOW,
        base_url="http://here",
        webhook_url="http://there",
        start_timeout_s=5.0,
        previews=True,
        keep_s=3600,
    )
    await queue.submit(job)
    record = await queue.get(job.request_id, "alice")
    assert record is not None
    assert record.job == job
    assert record.state == State.QUEUED


async def test_positions_count_what_runs_before(queue: Queue) -> None:
    low = make_job(priority=Priority.LOW)
    assert (await queue.submit(low)).position == 0
    assert (await queue.submit(make_job())).position == 0  # normal goes before low
    assert (await queue.submit(make_job())).position == 1
    assert (await queue.submit(make_job(model="other"))).position == 0
    record = await queue.get(low.request_id, low.tenant)
    assert record is not None
    assert record.position == 2


async def test_a_submit_may_be_refused_when_too_many_wait_and_leaves_nothing(queue: Queue) -> None:
    await asyncio.gather(*(queue.submit(make_job()) for _ in range(3)))
    late = make_job()
    assert (await queue.submit(make_job(), max_ahead=3)).position == 3
    with pytest.raises(QueueFull):
        await queue.submit(late, max_ahead=3)
    assert await queue.get(late.request_id, late.tenant) is None


async def test_claims_go_by_priority_and_then_by_acceptance(queue: Queue) -> None:
    jobs = [make_job(priority=p) for p in (Priority.LOW, Priority.NORMAL, Priority.LOW, Priority.NORMAL)]
    for job in jobs:
        await queue.submit(job)
    order = [each.job for each in await claim(queue)]
    assert order == [jobs[1], jobs[3], jobs[0], jobs[2]]


async def test_tenants_take_turns_and_each_keeps_its_own_order(queue: Queue) -> None:
    flood = [make_job(tenant="alice") for _ in range(6)]
    for job in flood:
        await queue.submit(job)
    late = [make_job(tenant="bob") for _ in range(3)]
    receipts = [await queue.submit(job) for job in late]
    assert [receipt.position for receipt in receipts] == [1, 3, 5]
    a, b = flood, late
    assert [each.job for each in await claim(queue)] == [a[0], b[0], a[1], b[1], a[2], b[2], *a[3:]]


async def test_who_comes_late_gets_no_turns_for_the_time_before(queue: Queue) -> None:
    flood = [make_job(tenant="alice") for _ in range(6)]
    for job in flood:
        await queue.submit(job)
    taken = [each.job for each in await claim(queue, limit=3)]
    late = [make_job(tenant="bob") for _ in range(2)]
    for job in late:
        await queue.submit(job)
    taken += [each.job for each in await claim(queue)]
    assert taken == [*flood[:4], late[0], flood[4], late[1], flood[5]]


async def test_a_low_priority_flood_does_not_delay_another_tenants_normal_request(queue: Queue) -> None:
    for _ in range(3):
        await queue.submit(make_job(tenant="alice", priority=Priority.LOW))
    normal = make_job(tenant="bob")
    assert (await queue.submit(normal)).position == 0
    assert [each.job for each in await claim(queue, limit=1)] == [normal]


async def test_a_claim_takes_at_most_its_limit_and_nothing_twice(queue: Queue) -> None:
    for _ in range(5):
        await queue.submit(make_job())
    taken = await asyncio.gather(*(claim(queue, owner, limit=2) for owner in ("one", "two", "three")))
    ids = [each.job.request_id for claims in taken for each in claims]
    assert sorted(len(claims) for claims in taken) == [1, 2, 2]
    assert len(set(ids)) == 5


async def test_what_comes_next_is_seen_in_the_order_of_claims_and_not_taken(
    queue: Queue, clock: Clock
) -> None:
    jobs = [make_job(priority=p) for p in (Priority.LOW, Priority.NORMAL, Priority.LOW, Priority.NORMAL)]
    late, other = make_job(start_timeout_s=5.0), make_job(model="other")
    for job in (*jobs, late, other):
        await queue.submit(job)
    clock.now += 5  # too late for one
    assert await queue.upcoming("flux", 10) == [jobs[1], jobs[3], jobs[0], jobs[2]]
    assert await queue.upcoming("flux", 2) == [jobs[1], jobs[3]]
    [first, second] = await claim(queue, limit=2)
    assert [first.job, second.job] == [jobs[1], jobs[3]]
    assert await queue.upcoming("flux", 10) == [jobs[0], jobs[2]]
    await queue.finish(first, DONE)
    await queue.release(second, Setback.CRASHED)
    await queue.cancel(jobs[0].request_id, jobs[0].tenant)
    assert await queue.upcoming("flux", 10) == [jobs[2]]
    clock.now += 4  # the backoff after a crash
    assert await queue.upcoming("flux", 10) == [jobs[3], jobs[2]]


async def test_what_waits_is_counted_up_to_a_limit(queue: Queue, clock: Clock) -> None:
    for job in (*(make_job() for _ in range(5)), make_job(start_timeout_s=5.0), make_job(model="other")):
        await queue.submit(job)
    clock.now += 5  # too late for one
    assert [await queue.backlog("flux", Priority.NORMAL, most) for most in (10, 5, 2)] == [5, 5, 2]
    await claim(queue, limit=2)
    assert await queue.backlog("flux", Priority.NORMAL, 10) == 3
    assert await queue.backlog("unknown", Priority.NORMAL, 10) == 0


async def test_events_are_kept_in_order_and_read_from_where_one_left(queue: Queue) -> None:
    job = make_job()
    await queue.submit(job, [Logged("noted", "WARN")])
    held = await only_claim(queue)
    await queue.record(held, [Logged("step 1/2"), Logged("step 2/2")])
    events = await queue.events(job.request_id)
    assert [each.event for each in events] == [
        Logged("noted", "WARN"),
        Logged("step 1/2"),
        Logged("step 2/2"),
    ]
    assert await queue.events(job.request_id, after=events[1].seq) == [events[2]]


async def test_a_result_once_stored_never_changes(queue: Queue) -> None:
    job = make_job()
    await queue.submit(job)
    held = await only_claim(queue)
    assert await queue.finish(held, DONE)
    assert not await queue.finish(held, replace(DONE, status=500))
    assert not await queue.release(held, Setback.CRASHED)
    assert await queue.cancel(job.request_id, job.tenant) == CancelOutcome.ALREADY_COMPLETED
    assert await result(queue, job) == DONE


async def test_a_lost_lease_puts_the_job_back_at_its_place(queue: Queue, clock: Clock) -> None:
    first, second = make_job(), make_job()
    for job in (first, second):
        await queue.submit(job)
    await claim(queue, limit=1)
    clock.now += 31
    assert await queue.sweep() == 1
    clock.now += 4  # the backoff after a crash
    assert [each.job for each in await claim(queue, "two")] == [first, second]


async def test_a_heartbeat_keeps_the_lease(queue: Queue, clock: Clock) -> None:
    job = make_job()
    await queue.submit(job)
    held = await only_claim(queue)
    for _ in range(5):
        clock.now += 20
        assert await queue.heartbeat([held]) == {job.request_id}
        assert await queue.sweep() == 0
    assert await queue.heartbeat([replace(held, fence=held.fence - 1)]) == frozenset()


async def test_only_the_claims_that_are_named_are_renewed(queue: Queue, clock: Clock) -> None:
    for _ in range(2):
        await queue.submit(make_job())
    kept, forgotten = await claim(queue)
    clock.now += 20
    await queue.heartbeat([kept])
    clock.now += 20
    assert await queue.sweep() == 1
    assert not await queue.finish(forgotten, DONE)
    assert await queue.finish(kept, DONE)


async def test_writes_with_a_stale_fence_are_refused(queue: Queue, clock: Clock) -> None:
    job = make_job()
    await queue.submit(job)
    old = await only_claim(queue)
    clock.now += 31
    await queue.sweep()
    clock.now += 4
    new = await only_claim(queue, "two")
    assert (old.attempt, new.attempt) == (1, 2)
    assert new.fence > old.fence
    assert not await queue.record(old, [Logged("ghost")])
    assert not await queue.finish(old, replace(DONE, status=500))
    assert await queue.finish(new, DONE)
    assert await result(queue, job) == DONE
    assert await queue.events(job.request_id) == []


async def test_a_job_that_kills_three_workers_is_given_up(queue: Queue, clock: Clock) -> None:
    job = make_job()
    await queue.submit(job)
    for crash, backoff in enumerate([4, 8, 0], start=1):
        assert await state(queue, job) == State.QUEUED
        held = await only_claim(queue)
        assert held.attempt == crash
        await queue.release(held, Setback.CRASHED)
        clock.now += backoff - 0.1
        assert await claim(queue) == []  # too early, or over
        clock.now += 0.1
    ended = await result(queue, job)
    assert (ended.status, ended.error_type) == (503, "runner_disconnected")


async def test_giving_a_claim_back_is_not_a_crash(queue: Queue) -> None:
    job = make_job()
    await queue.submit(job)
    for _ in range(10):
        await queue.release(await only_claim(queue), Setback.RETURNED)
    assert await state(queue, job) == State.QUEUED


async def test_a_job_that_nobody_could_keep_is_given_up_after_its_last_start(
    queue: Queue, clock: Clock
) -> None:
    """A lapse says nothing of the job, so it takes more of them than crashes."""
    job = make_job()
    await queue.submit(job)
    for attempt in range(1, LEASE.max_attempts + 1):
        clock.now += 10_000
        assert (await only_claim(queue)).attempt == attempt
        clock.now += 31
        assert await queue.sweep() == 1
    ended = await result(queue, job)
    assert (ended.status, ended.error_type) == (503, "runner_disconnected")


@pytest.mark.parametrize("setback", [Setback.CRASHED, Setback.LAPSED])
@pytest.mark.parametrize("most", [1, 2, 20])
async def test_a_job_is_retried_as_often_as_its_caller_and_the_server_allow(
    queue: Queue, clock: Clock, most: int, setback: Setback
) -> None:
    job = make_job(max_retries=most)
    await queue.submit(job)
    starts = 0
    while await state(queue, job) != State.COMPLETED:
        clock.now += 10_000
        await queue.release(await only_claim(queue), setback)
        starts += 1
    of_server = LEASE.max_crashes if setback is Setback.CRASHED else LEASE.max_attempts
    assert starts == min(most + 1, of_server)


@pytest.mark.parametrize("setback", [Setback.CRASHED, Setback.LAPSED])
async def test_a_job_that_is_not_to_be_retried_ends_with_its_first_start(
    queue: Queue, clock: Clock, setback: Setback
) -> None:
    job = make_job(max_retries=0)
    await queue.submit(job)
    await queue.release(await only_claim(queue), Setback.UNSTARTED)
    await queue.release(await only_claim(queue), Setback.RETURNED)
    assert await state(queue, job) == State.QUEUED
    await queue.release(await only_claim(queue), setback)
    assert (await result(queue, job)).error_type == "runner_disconnected"


async def test_a_cancelled_job_that_waits_never_runs(queue: Queue) -> None:
    job = make_job()
    await queue.submit(job)
    assert await queue.cancel(job.request_id, job.tenant) == CancelOutcome.REQUESTED
    assert await claim(queue) == []
    ended = await result(queue, job)
    assert (ended.status, ended.error_type) == (499, "client_cancelled")
    assert await queue.cancel(job.request_id, job.tenant) == CancelOutcome.ALREADY_COMPLETED


async def test_a_cancel_that_was_acknowledged_wins_over_a_result(queue: Queue) -> None:
    job = make_job()
    await queue.submit(job)
    held = await only_claim(queue)
    assert await queue.cancel(job.request_id, job.tenant) == CancelOutcome.REQUESTED
    assert (await queue.waiting("one", ["flux"])).cancelled == {job.request_id}
    assert (await queue.waiting("two", ["flux"])).cancelled == frozenset()
    assert await queue.finish(held, DONE)
    assert (await result(queue, job)).error_type == "client_cancelled"


async def test_nothing_is_tried_again_after_a_cancel(queue: Queue) -> None:
    job = make_job()
    await queue.submit(job)
    held = await only_claim(queue)
    await queue.cancel(job.request_id, job.tenant)
    await queue.release(held, Setback.CRASHED)
    assert (await result(queue, job)).error_type == "client_cancelled"


async def test_of_a_cancel_and_a_finish_at_once_exactly_one_wins(queue: Queue) -> None:
    for _ in range(50):
        job = make_job()
        await queue.submit(job)
        held = await only_claim(queue)
        outcome, finished = await asyncio.gather(
            queue.cancel(job.request_id, job.tenant), queue.finish(held, DONE)
        )
        assert finished
        cancelled = (await result(queue, job)).error_type == "client_cancelled"
        assert cancelled == (outcome == CancelOutcome.REQUESTED)


async def test_another_tenants_job_is_unknown(queue: Queue) -> None:
    job = make_job(tenant="alice")
    await queue.submit(job)
    assert await queue.get(job.request_id, "bob") is None
    assert await queue.cancel(job.request_id, "bob") == CancelOutcome.NOT_FOUND
    assert [snapshot async for snapshot in queue.watch(job.request_id, "bob")] == []


async def test_a_job_never_starts_after_its_start_deadline(queue: Queue, clock: Clock) -> None:
    job = make_job(start_timeout_s=5.0)
    await queue.submit(job)
    assert (await queue.waiting("one", ["flux"])).next_due == clock.now + 5
    clock.now += 5
    assert await claim(queue) == []
    assert await queue.sweep() == 1
    ended = await result(queue, job)
    assert (ended.status, ended.error_type) == (504, "request_timeout")


async def test_a_job_that_no_worker_took_keeps_its_start_deadline(queue: Queue, clock: Clock) -> None:
    await queue.submit(make_job(start_timeout_s=5.0))
    for _ in range(3):
        held = await only_claim(queue)
        assert held.start_deadline == clock.now + 5
        await queue.release(held, Setback.UNSTARTED)
    clock.now += 5
    assert await claim(queue) == []
    assert await queue.sweep() == 1


async def test_a_job_that_started_in_time_may_be_tried_again_later(queue: Queue, clock: Clock) -> None:
    job = make_job(start_timeout_s=5.0)
    await queue.submit(job)
    held = await only_claim(queue)
    assert await queue.begin(held)
    await queue.release(held, Setback.CRASHED)
    assert not await queue.begin(held)
    clock.now += 60
    assert (await only_claim(queue)).job == job


@pytest.mark.parametrize("setback", list(Setback))
async def test_a_job_that_never_began_keeps_its_start_deadline(
    queue: Queue, clock: Clock, setback: Setback
) -> None:
    job = make_job(start_timeout_s=5.0)
    await queue.submit(job)
    await queue.release(await only_claim(queue), setback)
    clock.now += 60
    assert await claim(queue) == []
    assert await queue.sweep() == 1
    assert (await result(queue, job)).error_type == "request_timeout"


async def test_the_longest_webhook_that_is_taken_can_be_owed(queue: Queue) -> None:
    url = f"https://there.example/{secrets.token_urlsafe(MAX_URL_BYTES)}"[:MAX_URL_BYTES]
    await queue.submit(make_job(webhook_url=url))
    assert await queue.finish(await only_claim(queue), JobResult.success(OUTPUT, 0.5))


async def test_a_webhook_is_owed_in_the_transaction_that_ends_the_job(queue: Queue) -> None:
    asked, silent = make_job(webhook_url="http://there"), make_job()
    for job in (asked, silent):
        await queue.submit(job)
    for held in await claim(queue):
        await queue.finish(held, DONE)
    owed = await queue._database.read(lambda connection: connection.execute(deliveries.select()).all())
    assert [(row.request_id, row.url, row.state) for row in owed] == [
        (asked.request_id, "http://there", "due")
    ]


async def test_what_waits_follows_its_endpoint_to_another_model(queue: Queue) -> None:
    job = make_job()
    await queue.submit(job)
    await queue.reroute({job.endpoint_id: "bigger"})
    assert await claim(queue) == []
    assert [each.job.request_id for each in await queue.claim("bigger", "one", 1)] == [job.request_id]


async def test_previews_are_gone_when_the_job_is_done(queue: Queue) -> None:
    job = make_job(previews=True)
    await queue.submit(job)
    held = await only_claim(queue)
    await queue.record(held, [Previewed(OUTPUT)])
    assert [each.event for each in await queue.events(job.request_id)] == [Previewed(OUTPUT)]
    await queue.finish(held, DONE)
    assert await queue.events(job.request_id) == []


async def collect(queue: Queue, job: Job) -> list[Snapshot]:
    return [snapshot async for snapshot in queue.watch(job.request_id, job.tenant)]


async def test_a_watcher_sees_every_event_once_and_the_result_last(queue: Queue) -> None:
    job = make_job()
    await queue.submit(job)
    watcher = queue.watch(job.request_id, job.tenant)
    assert (await anext(watcher)).record.state == State.QUEUED
    held = await only_claim(queue)
    for step in (1, 2, 3):
        await queue.record(held, [Logged(f"step {step}/3")])
    await queue.finish(held, DONE, [Logged("finished")])
    rest = [snapshot async for snapshot in watcher]
    lines = [each.event.message for s in rest for each in s.events if isinstance(each.event, Logged)]
    assert lines == ["step 1/3", "step 2/3", "step 3/3", "finished"]
    assert rest[-1].record.result == DONE


async def test_a_watcher_of_a_finished_job_gets_one_snapshot(queue: Queue) -> None:
    job = make_job()
    await queue.submit(job)
    await queue.finish(await only_claim(queue), DONE)
    [snapshot] = await collect(queue, job)
    assert snapshot.record.result == DONE


async def test_many_watchers_all_see_the_end(queue: Queue) -> None:
    jobs = [make_job() for _ in range(20)]
    for job in jobs:
        await queue.submit(job)
    watching = [asyncio.create_task(collect(queue, job)) for job in jobs for _ in range(5)]
    for held in await claim(queue, limit=20):
        await queue.finish(held, DONE)
    for snapshots in await asyncio.wait_for(asyncio.gather(*watching), 30):
        assert snapshots[-1].record.result == DONE


async def test_concurrent_submits_are_all_kept_in_one_order(queue: Queue) -> None:
    jobs = [make_job() for _ in range(300)]
    receipts = await asyncio.gather(*(queue.submit(job) for job in jobs))
    assert sorted(receipt.position for receipt in receipts) == list(range(300))
    assert len(await claim(queue, limit=1000)) == 300


async def test_what_fails_in_the_database_tells_nothing_of_a_request(queue: Queue) -> None:
    job = make_job(input={"prompt": "a word that is nobody else's"})
    await queue.submit(job)
    with pytest.raises(IntegrityError) as failed:
        await queue.submit(job)
    assert "INSERT INTO requests" in str(failed.value)
    assert "nobody else" not in str(failed.value)


async def test_a_second_submit_of_an_id_is_refused_and_harms_no_other(queue: Queue) -> None:
    job, other = make_job(), make_job()
    await queue.submit(job)
    twice, fine = await asyncio.gather(queue.submit(job), queue.submit(other), return_exceptions=True)
    assert isinstance(twice, Exception)
    assert not isinstance(fine, BaseException)
    assert len(await claim(queue)) == 2


@pytest.mark.parametrize("text", ["'; DROP TABLE requests; --", "% _ \\", "\u202e", "a" * 30_000])
async def test_texts_are_only_texts(queue: Queue, text: str) -> None:
    job = make_job(input={"prompt": text}, tenant=text[:50])
    await queue.submit(job)
    record = await queue.get(job.request_id, text[:50])
    assert record is not None
    assert record.job.input == {"prompt": text}


# --- the same submit again ---


async def test_a_key_is_remembered_for_a_day(queue: Queue, clock: Clock) -> None:
    once = Once("key", "fingerprint")
    first, second = [await queue.submit(make_job(), once=once) for _ in range(2)]
    assert second == Receipt(first.request_id, 0, replayed=True)
    clock.now += 24 * 3600 + 1
    third = await queue.submit(make_job(), once=once)
    assert third.request_id != first.request_id and not third.replayed


async def test_the_receipt_of_a_known_key_has_the_true_position(queue: Queue) -> None:
    once = Once("key", "fingerprint")
    await queue.submit(make_job())
    first = await queue.submit(make_job(), once=once)
    await queue.submit(make_job())
    assert (await queue.submit(make_job(), once=once)).position == first.position == 1


async def test_a_known_key_with_another_input_keeps_nothing(queue: Queue) -> None:
    await queue.submit(make_job(), once=Once("key", "one"))
    job = make_job()
    with pytest.raises(KeyReused):
        await queue.submit(job, once=Once("key", "other"))
    assert await queue.get(job.request_id, job.tenant) is None


async def test_a_refused_submit_leaves_no_key(queue: Queue) -> None:
    once = Once("key", "fingerprint")
    await queue.submit(make_job())
    with pytest.raises(QueueFull):
        await queue.submit(make_job(), max_ahead=0, once=once)
    assert not (await queue.submit(make_job(), once=once)).replayed


# --- a caller's past ---


async def test_recent_requests_come_newest_first_and_in_pages(queue: Queue) -> None:
    jobs = [make_job() for _ in range(3)]
    for job in [*jobs, make_job(tenant="other")]:
        await queue.submit(job)
    newest = await queue.recent("public", 2)
    assert [record.job for _, record in newest] == jobs[:0:-1]
    rest = await queue.recent("public", 2, before=newest[-1][0])
    assert [record.job for _, record in rest] == jobs[:1]
    assert await queue.recent("public", 2, endpoints=["fal-ai/other"]) == []


async def test_erasing_leaves_that_there_was_a_request_and_no_more(queue: Queue) -> None:
    job = make_job()
    await queue.submit(job, [Logged("a line")])
    with pytest.raises(BadRequest):
        await queue.erase(job.request_id, job.tenant)
    await queue.cancel(job.request_id, job.tenant)
    assert await queue.erase(job.request_id, "other") is None
    before = await queue.erase(job.request_id, job.tenant)
    assert before is not None and before.job == job
    after = await queue.get(job.request_id, job.tenant)
    assert after is not None and after.result is not None
    assert (after.state, after.job.input, after.result.status) == (State.COMPLETED, {}, 410)
    assert await queue.events(job.request_id) == []


async def test_nothing_is_erased_while_it_is_owed_or_under_way(queue: Queue) -> None:
    job = make_job(webhook_url="https://there.example/hook")
    await queue.submit(job)
    for why in ("in progress", "still being delivered"):
        with pytest.raises(BadRequest, match=why):
            await queue.erase(job.request_id, job.tenant)
        await queue.cancel(job.request_id, job.tenant)


async def test_what_is_not_to_be_kept_is_erased_once_nobody_needs_it(queue: Queue, clock: Clock) -> None:
    kept, unkept = make_job(), make_job(stores_io=False)
    owing = make_job(stores_io=False, webhook_url="https://there.example/hook")
    for job in (kept, unkept, owing):
        await queue.submit(job)
    for each in await claim(queue, limit=3):
        await queue.finish(each, DONE)
    clock.now += UNKEPT_S - 1
    assert await queue.sweep() == 0
    clock.now += 1
    assert await queue.sweep() == 1
    assert await queue.sweep() == 0
    found = [await queue.get(job.request_id, job.tenant) for job in (kept, unkept, owing)]
    results = [record.result for record in found if record is not None]
    assert [result.status for result in results if result is not None] == [200, 410, 200]
    assert found[1] is not None and found[1].job.input == {}


async def test_what_was_kept_long_enough_is_forgotten_with_all_that_hangs_on_it(
    queue: Queue, clock: Clock
) -> None:
    old, owing, young = make_job(), make_job(webhook_url="https://there.example/hook"), make_job()
    for job in (old, owing):
        await queue.submit(job, [Logged("a line")], once=Once(job.request_id, "fingerprint"))
    for each in await claim(queue):
        await queue.finish(each, DONE)
    clock.now += Retention().results_s - 1
    await queue.submit(young)
    await queue.sweep()  # of the keys
    assert await queue.get(old.request_id, old.tenant) is not None
    clock.now += 1
    assert await queue.sweep() == 1
    left = [await queue.get(job.request_id, job.tenant) is not None for job in (old, owing, young)]
    assert left == [False, True, True]  # a webhook that is owed is made of what would be forgotten

    def rows_of(request_id: str) -> Callable[[Connection], dict[str, int]]:
        def count(connection: Connection) -> dict[str, int]:
            return {
                table.name: len(connection.execute(table.select().filter_by(request_id=request_id)).all())
                for table in metadata.sorted_tables
                if "request_id" in table.c
            }

        return count

    assert not any((await queue._database.read(rows_of(old.request_id))).values())


async def test_the_audit_is_kept_for_its_time(queue: Queue, clock: Clock, queue_url: str) -> None:
    book = open_audit(queue_url)
    await queue.submit(make_job())
    clock.now += Retention().audit_s
    await queue.submit(make_job())
    assert len(await book.newest(10)) == 2
    await queue.sweep()
    assert [entry.at for entry in await book.newest(10)] == [clock.now]
    await book.close()


async def test_positions_are_counted_up_to_a_number(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.queue.lookup.MAX_POSITION", 2)
    monkeypatch.setattr("deployments.queue.submit.MAX_RECEIPT_POSITION", 1)
    receipts = [await queue.submit(make_job()) for _ in range(5)]
    assert [receipt.position for receipt in receipts] == [0, 1, 1, 1, 1]
    with pytest.raises(QueueFull):
        await queue.submit(make_job(), max_ahead=4)
    assert (await queue.submit(make_job(), max_ahead=5)).position == 5


async def test_a_sweep_ends_in_batches(queue: Queue, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.queue.upkeep.BATCH", 2)
    for _ in range(3):
        await queue.submit(make_job(start_timeout_s=1.0))
    clock.now += 1
    assert [await queue.sweep() for _ in range(3)] == [2, 1, 0]


# --- leaders ---


async def test_one_leads_until_it_is_heard_of_no_more(queue: Queue, clock: Clock) -> None:
    assert await queue.leads("upkeep", "one")
    assert not await queue.leads("upkeep", "two")
    assert await queue.leads("another role", "two")
    for _ in range(4):  # it stays who asks in time
        clock.now += LEAD_S * 0.8
        assert await queue.leads("upkeep", "one")
    clock.now += LEAD_S + 0.1
    assert await queue.leads("upkeep", "two")
    assert not await queue.leads("upkeep", "one")


async def test_of_several_that_want_to_lead_at_once_one_does(queue: Queue, clock: Clock) -> None:
    for _ in range(3):
        asked = [queue.leads("upkeep", f"dispatcher {number}") for number in range(8)]
        assert sum(await asyncio.gather(*asked)) == 1
        clock.now += LEAD_S + 0.1
