"""What the webhooks that are owed promise, on every store."""

import asyncio

import pytest

from deployments.queue import Outbox, Queue, Setback
from schemas.deliveries import Delivery, DeliveryState, Outcome
from schemas.errors import Erased, InternalError
from schemas.jobs import Job, JobResult
from tests.support.jobs import OUTPUT, Clock, make_job

LEASE_S = 60.0
TAKEN = Outcome(200, None, 0.25)
REFUSED = Outcome(500, None, 0.5)
DONE = JobResult.success(OUTPUT, 0.5)


@pytest.fixture
def outbox(queue: Queue, clock: Clock) -> Outbox:
    return Outbox(queue._database, LEASE_S, clock)


async def finish(queue: Queue, *jobs: Job, result: JobResult = DONE) -> None:
    for job in jobs:
        await queue.submit(job)
    for claim in await queue.claim("flux", "one", len(jobs)):
        assert await queue.finish(claim, result)


async def owe(queue: Queue, url: str = "https://there.example/hook") -> Job:
    job = make_job(webhook_url=url, tenant="alice")
    await finish(queue, job)
    return job


async def claim(outbox: Outbox, host: str = "there.example", room: int = 10) -> list[Delivery]:
    return await outbox.claim({host: room})


async def only_claim(outbox: Outbox) -> Delivery:
    [delivery] = await claim(outbox)
    return delivery


async def state(outbox: Outbox, job: Job) -> DeliveryState:
    found = await outbox.find(job.request_id)
    assert found is not None
    return found[0].state


async def test_what_is_claimed_says_how_the_request_ended(queue: Queue, outbox: Outbox) -> None:
    job = await owe(queue)
    assert await outbox.due_hosts() == ["there.example"]
    delivery = await only_claim(outbox)
    assert (delivery.request_id, delivery.tenant, delivery.url) == (job.request_id, "alice", job.webhook_url)
    assert (delivery.status, delivery.body) == (200, OUTPUT)
    assert (delivery.attempt, delivery.retries) == (1, 0)


async def test_nothing_is_owed_unasked_or_before_the_end(queue: Queue, outbox: Outbox) -> None:
    await finish(queue, make_job())
    unfinished = make_job(webhook_url="https://there.example")
    await queue.submit(unfinished)
    assert await outbox.due_hosts() == []
    assert await claim(outbox) == []
    assert await outbox.find(unfinished.request_id) is None


async def test_every_end_is_owed_once(queue: Queue, outbox: Outbox, clock: Clock) -> None:
    hook = "https://there.example"
    failed, cancelled, lost = (make_job(webhook_url=hook) for _ in range(3))
    late = make_job(webhook_url=hook, start_timeout_s=5.0)
    await finish(queue, failed, result=JobResult.failure(InternalError("broken")))
    await queue.submit(cancelled)
    await queue.cancel(cancelled.request_id, cancelled.tenant)
    await queue.cancel(cancelled.request_id, cancelled.tenant)
    await queue.submit(late)
    clock.now += 6
    await asyncio.gather(queue.sweep(), queue.sweep())
    await queue.submit(lost)
    for _ in range(3):
        clock.now += 60
        [held] = await queue.claim("flux", "one", 1)
        await queue.release(held, Setback.CRASHED)
    assert not await queue.finish(held, DONE)
    owed = {delivery.request_id: delivery.status for delivery in await claim(outbox)}
    assert owed == {
        failed.request_id: 500,
        cancelled.request_id: 499,
        late.request_id: 504,
        lost.request_id: 503,
    }


async def test_what_was_delivered_is_not_due_again(queue: Queue, outbox: Outbox, clock: Clock) -> None:
    job = await owe(queue)
    assert await outbox.settle(await only_claim(outbox), TAKEN, DeliveryState.DELIVERED)
    clock.now += 10**6
    assert await outbox.due_hosts() == []
    assert await claim(outbox) == []
    found = await outbox.find(job.request_id)
    assert found is not None
    record, [tried] = found
    assert (record.state, record.attempts, record.last_status) == (DeliveryState.DELIVERED, 1, 200)
    assert (record.ended_at, record.next_attempt_at) == (1_000_000.0, None)
    assert (tried.attempt, tried.began_at, tried.outcome) == (1, 1_000_000.0, TAKEN)


async def test_a_retry_is_due_at_its_time_and_not_before(queue: Queue, outbox: Outbox, clock: Clock) -> None:
    job = await owe(queue)
    first = await only_claim(outbox)
    assert await outbox.settle(first, REFUSED, DeliveryState.DUE, clock.now + 30)
    clock.now += 29
    assert await outbox.due_hosts() == []
    clock.now += 1
    assert await outbox.due_hosts() == ["there.example"]
    second = await only_claim(outbox)
    assert (second.attempt, second.retries) == (2, 1)
    await outbox.settle(second, Outcome(None, "silent", 15.0), DeliveryState.FAILED)
    found = await outbox.find(job.request_id)
    assert found is not None
    assert found[0].state == DeliveryState.FAILED
    assert found[0].ended_at == clock.now
    assert [tried.outcome for tried in found[1]] == [REFUSED, Outcome(None, "silent", 15.0)]


async def test_two_senders_never_hold_one_webhook(queue: Queue, outbox: Outbox, clock: Clock) -> None:
    jobs = [await owe(queue) for _ in range(20)]
    other = Outbox(queue._database, LEASE_S, clock)
    taken = await asyncio.gather(*(claim(each, room=3) for each in (outbox, other) * 5))
    ids = [delivery.request_id for each in taken for delivery in each]
    assert sorted(ids) == sorted(job.request_id for job in jobs)


async def test_what_a_dead_sender_held_falls_due_when_its_lease_ends(
    queue: Queue, outbox: Outbox, clock: Clock
) -> None:
    job = await owe(queue)
    held = await only_claim(outbox)
    clock.now += LEASE_S - 1
    assert await outbox.due_hosts() == []
    assert await claim(outbox) == []
    clock.now += 1
    assert await outbox.due_hosts() == ["there.example"]
    again = await only_claim(outbox)
    assert (again.request_id, again.attempt, again.retries) == (job.request_id, 2, 0)
    assert not await outbox.settle(held, REFUSED, DeliveryState.FAILED)  # it was not dead, only late
    assert await state(outbox, job) == DeliveryState.SENDING
    assert await outbox.settle(again, TAKEN, DeliveryState.DELIVERED)
    found = await outbox.find(job.request_id)
    assert found is not None
    assert [tried.outcome for tried in found[1]] == [REFUSED, TAKEN]


async def test_an_outcome_that_is_late_counts_while_nobody_else_has_the_webhook(
    queue: Queue, outbox: Outbox, clock: Clock
) -> None:
    job = await owe(queue)
    held = await only_claim(outbox)
    clock.now += LEASE_S + 1
    assert await outbox.settle(held, TAKEN, DeliveryState.DELIVERED)
    assert await claim(outbox) == []
    assert await state(outbox, job) == DeliveryState.DELIVERED


async def test_giving_back_costs_no_retry(queue: Queue, outbox: Outbox) -> None:
    await owe(queue)
    assert await outbox.release(await only_claim(outbox), Outcome(None, "stopped", 1.0))
    again = await only_claim(outbox)
    assert (again.attempt, again.retries) == (2, 0)


async def test_each_host_gets_its_own_room_oldest_first(queue: Queue, outbox: Outbox, clock: Clock) -> None:
    dead = []
    for _ in range(5):
        dead.append(await owe(queue, "https://dead.example:8443/x"))
        clock.now += 1
    other = await owe(queue, "http://Other.example./y")
    assert sorted(await outbox.due_hosts()) == ["dead.example", "other.example"]
    taken = await outbox.claim({"dead.example": 2, "other.example": 2})
    assert [each.request_id for each in taken] == [
        dead[0].request_id,
        dead[1].request_id,
        other.request_id,
    ]


@pytest.mark.parametrize("ended", [DeliveryState.DELIVERED, DeliveryState.FAILED])
async def test_the_operator_has_a_webhook_sent_again_with_all_its_retries(
    queue: Queue, outbox: Outbox, clock: Clock, ended: DeliveryState
) -> None:
    job = await owe(queue)
    await outbox.settle(await only_claim(outbox), REFUSED, DeliveryState.DUE, clock.now + 10)
    clock.now += 10
    last = await only_claim(outbox)
    assert await outbox.redeliver(job.request_id) == DeliveryState.SENDING  # and nothing happens
    await outbox.settle(last, REFUSED, ended)
    assert await outbox.redeliver(job.request_id) == ended
    again = await only_claim(outbox)
    assert (again.attempt, again.retries) == (3, 0)
    assert await outbox.redeliver("unknown") is None


async def test_what_has_been_erased_is_not_sent_again(queue: Queue, outbox: Outbox) -> None:
    job = make_job(webhook_url="https://there.example")
    await finish(queue, job)
    [delivery] = await claim(outbox)
    await outbox.settle(delivery, Outcome(200, None, 0.1), DeliveryState.DELIVERED)
    await queue.erase(job.request_id, job.tenant)
    with pytest.raises(Erased):
        await outbox.redeliver(job.request_id)
    assert await claim(outbox) == []


async def test_the_newest_come_first_and_may_be_chosen_by_state(queue: Queue, outbox: Outbox) -> None:
    jobs = [await owe(queue) for _ in range(3)]
    await outbox.settle((await claim(outbox, room=1))[0], REFUSED, DeliveryState.FAILED)
    ids = [job.request_id for job in jobs]
    assert [each.request_id for each in await outbox.newest(2)] == [ids[2], ids[1]]
    assert [each.request_id for each in await outbox.newest(9, DeliveryState.FAILED)] == [ids[0]]


async def test_a_url_that_cannot_be_taken_apart_hinders_no_request(queue: Queue, outbox: Outbox) -> None:
    job = await owe(queue, "http://[")
    assert [each.request_id for each in await outbox.claim({"": 1})] == [job.request_id]
