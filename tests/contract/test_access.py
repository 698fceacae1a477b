"""Keys in the database, what they may submit, and what is written down: on every store."""

import asyncio
from dataclasses import asdict
from typing import Any
from uuid import uuid4

import pytest

from deployments.queue import Audit, KeyTable, Outbox, Queue, open_keys, open_queue
from schemas.access import Action, Actor, Allowance, Key
from schemas.deliveries import DeliveryState
from schemas.errors import (
    DarkroomError,
    KeyReused,
    NotAuthenticated,
    QueueFull,
    QuotaSpent,
    RequestError,
    TooManyRequests,
    TooManyRuns,
)
from schemas.jobs import CancelOutcome, JobResult, Once, Priority
from schemas.settings import LeaseSettings
from tests.support.jobs import OUTPUT, Clock, make_job

DAY_S = 86_400


@pytest.fixture
def table(queue: Queue, clock: Clock) -> KeyTable:
    return KeyTable(queue._database, clock)


@pytest.fixture
def audit(queue: Queue) -> Audit:
    return Audit(queue._database)


async def keyed(table: KeyTable, tenant: str = "alice", **allowance: Any) -> Actor:
    """Who holds a new key."""
    key, _ = await table.create(tenant, allowance=Allowance(**allowance))
    return Actor(key.tenant, key.key_id, "192.0.2.7", key.allowance)


async def submitted(queue: Queue, by: Actor, **options: Any) -> str:
    job = make_job(tenant=by.tenant)
    return (await queue.submit(job, by=by, **options)).request_id


# --- the table ---


async def test_t02_a_key_is_kept_without_its_secret(table: KeyTable) -> None:
    key, secret = await table.create("alice", "for the web shop", Allowance(Priority.LOW, 5, 4, 3, 2))
    assert await table.all() == [key]
    assert len(bytes.fromhex(secret)) == 32 and len(key.digest) == 64
    assert secret not in str(asdict(key)) and key.digest not in repr(key)


async def test_t02_no_two_secrets_are_the_same(table: KeyTable) -> None:
    made = [await table.create() for _ in range(50)]
    assert len({secret for _, secret in made}) == len({key.key_id for key, _ in made}) == 50


async def test_without_a_tenant_a_key_is_one_of_its_own(table: KeyTable) -> None:
    key, _ = await table.create()
    assert key.tenant == key.key_id


@pytest.mark.parametrize("tenant", ["", "a b", "é", "x" * 101, "a\n", "a:b", "a/b"])
async def test_what_no_tenant_can_be_is_refused(tenant: str, table: KeyTable) -> None:
    with pytest.raises(ValueError, match="a tenant is"):
        await table.create(tenant)


@pytest.mark.parametrize("label", ["x" * 201, "a\nb", "\x1b[31m"])
async def test_a_label_is_a_line_of_text(label: str, table: KeyTable) -> None:
    with pytest.raises(ValueError, match="a label is"):
        await table.create("alice", label)


async def test_a_key_is_revoked_once(table: KeyTable, clock: Clock) -> None:
    key, _ = await table.create("alice")
    clock.now += 5
    assert await table.revoke(key.key_id) == key
    clock.now += 5
    before = await table.revoke(key.key_id)
    assert before is not None and before.revoked_at == clock.now - 5
    assert await table.revoke("nobody") is None


async def test_the_table_is_read_again_only_when_it_has_changed(table: KeyTable) -> None:
    first = await table.since(None)
    assert first is not None and first[1] == []
    assert await table.since(first[0]) is None
    key, _ = await table.create()
    second = await table.since(first[0])
    assert second is not None and second[1] == [key]
    await table.revoke(key.key_id)
    third = await table.since(second[0])
    assert third is not None and third[1][0].revoked_at is not None
    assert await table.since(third[0]) is None


# --- limits ---


async def test_t34_a_minute_has_so_many_requests(queue: Queue, table: KeyTable, clock: Clock) -> None:
    alice, bob = await keyed(table, per_minute=3), await keyed(table, "bob", per_minute=3)
    for _ in range(3):
        await submitted(queue, alice)
    with pytest.raises(TooManyRequests) as refused:
        await submitted(queue, alice)
    assert refused.value.retry_after_s == 20
    await submitted(queue, bob)
    clock.now += 19
    with pytest.raises(TooManyRequests) as refused:
        await submitted(queue, alice)
    assert refused.value.retry_after_s == 1
    clock.now += 1
    await submitted(queue, alice)
    clock.now += 10 * DAY_S
    for _ in range(3):  # a long pause does not add up
        await submitted(queue, alice)
    with pytest.raises(TooManyRequests):
        await submitted(queue, alice)
    clock.now -= DAY_S  # a clock that goes back takes nothing away, and gives nothing
    with pytest.raises(TooManyRequests):
        await submitted(queue, alice)


async def test_t34_a_day_has_so_many_requests_and_begins_at_midnight_utc(
    queue: Queue, table: KeyTable, clock: Clock
) -> None:
    clock.now = 20_000 * DAY_S + 1
    alice = await keyed(table, daily_requests=2)
    for _ in range(2):
        await submitted(queue, alice)
    with pytest.raises(QuotaSpent) as refused:
        await submitted(queue, alice)
    assert refused.value.retry_after_s == DAY_S - 1 and not refused.value.retryable
    clock.now = 20_001 * DAY_S - 0.5
    with pytest.raises(QuotaSpent) as refused:
        await submitted(queue, alice)
    assert refused.value.retry_after_s == 1
    clock.now = 20_001 * DAY_S
    await submitted(queue, alice)


async def test_t34_so_many_requests_of_a_tenant_wait(queue: Queue, table: KeyTable) -> None:
    alice, other = await keyed(table, max_queued=2), await keyed(table, max_queued=3)
    bob = await keyed(table, "bob", max_queued=2)
    await submitted(queue, bob)
    for _ in range(2):
        await submitted(queue, alice)
    with pytest.raises(QueueFull):
        await submitted(queue, alice)
    await submitted(queue, other)  # the same tenant, by a key that may more
    with pytest.raises(QueueFull):
        await submitted(queue, other)
    await queue.claim("flux", "here", 10)
    await submitted(queue, alice)


async def test_t34_runs_are_refused_beyond_so_many_unfinished_requests(queue: Queue, table: KeyTable) -> None:
    alice = await keyed(table, max_running=2)
    await submitted(queue, alice, waits=True)
    [claim] = await queue.claim("flux", "here", 10)
    await submitted(queue, alice, waits=True)
    with pytest.raises(TooManyRuns):
        await submitted(queue, alice, waits=True)
    await submitted(queue, alice)  # the queue takes it
    [second] = await queue.claim("flux", "here", 10)
    for each in (claim, second):
        await queue.finish(each, JobResult.success(OUTPUT, 0.5))
    await submitted(queue, alice, waits=True)


async def test_t34_no_more_of_a_tenants_requests_run_at_once_than_may(queue: Queue, table: KeyTable) -> None:
    alice, bob = await keyed(table, max_running=2), await keyed(table, "bob")
    await keyed(table, max_running=5)  # another key of alice's: the smaller number counts
    for _ in range(4):
        await submitted(queue, alice)
    await submitted(queue, bob)
    first = await queue.claim("flux", "here", 10)
    assert sorted(each.job.tenant for each in first) == ["alice", "alice", "bob"]
    assert await queue.claim("flux", "here", 10) == []
    await submitted(queue, bob)
    assert [each.job.tenant for each in await queue.claim("flux", "here", 10)] == ["bob"]
    ended = next(each for each in first if each.job.tenant == "alice")
    await queue.finish(ended, JobResult.success(OUTPUT, 0.5))
    assert [each.job.tenant for each in await queue.claim("flux", "here", 10)] == ["alice"]


async def test_t34_where_nothing_may_be_claimed_nothing_is_written(
    queue: Queue, table: KeyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each commit rings at the dispatchers, who would claim again in vain, and ring, as fast as they can."""
    alice = await keyed(table, max_running=1)
    for _ in range(2):
        await submitted(queue, alice)
    await queue.submit(make_job(tenant="bob", priority=Priority.LOW))
    [taken] = await queue.claim("flux", "here", 10, low_limit=0)

    async def write(operation: Any) -> Any:
        raise AssertionError("somebody is rung for nothing")

    with monkeypatch.context() as patched:
        patched.setattr(queue._database, "write", write)
        assert await queue.claim("flux", "here", 10, low_limit=0) == []
    assert taken.job.tenant == "alice"
    assert [each.job.tenant for each in await queue.claim("flux", "here", 10, low_limit=1)] == ["bob"]


async def test_t34_what_is_refused_leaves_nothing_and_costs_nothing(
    queue: Queue, table: KeyTable, audit: Audit, clock: Clock
) -> None:
    alice = await keyed(table, per_minute=2, daily_requests=3)
    await submitted(queue, alice)
    for _ in range(2):
        with pytest.raises(QueueFull):
            await submitted(queue, alice, max_ahead=0)
    await submitted(queue, alice)
    for _ in range(5):
        with pytest.raises(TooManyRequests):
            await submitted(queue, alice, once=Once("key", "print"))
    clock.now += 30
    await submitted(queue, alice, once=Once("key", "print"))
    rows = [each for each in await audit.newest(100) if each.action == Action.SUBMIT]
    assert len(rows) == len(await queue.recent("alice", 100)) == 3


async def test_what_comes_again_under_an_idempotency_key_is_not_counted(
    queue: Queue, table: KeyTable, audit: Audit
) -> None:
    alice = await keyed(table, per_minute=1, max_queued=1, max_running=1, daily_requests=1)
    once = Once("key", "print")
    first = await submitted(queue, alice, once=once)
    for waits in (False, True):
        assert await submitted(queue, alice, once=once, waits=waits) == first
    with pytest.raises(KeyReused):
        await submitted(queue, alice, once=Once("key", "another"))
    assert [each.subject for each in await audit.newest(100) if each.action == Action.SUBMIT] == [first]


async def test_t03_the_same_idempotency_key_of_two_tenants_is_two_requests(queue: Queue) -> None:
    once = Once("key", "print")
    ids = {await submitted(queue, Actor(name), once=once) for name in ("alice", "bob")}
    assert len(ids) == 2


@pytest.mark.parametrize("gone", ["revoked", "unknown", "of another tenant"])
async def test_t01_a_limited_key_that_is_no_more_submits_nothing(
    gone: str, queue: Queue, table: KeyTable
) -> None:
    alice = await keyed(table, per_minute=5)
    if gone == "revoked":
        await table.revoke(str(alice.key_id))
    else:
        name = "alice" if gone == "unknown" else "bob"
        alice = Actor(name, "nobody" if gone == "unknown" else alice.key_id, None, alice.allowance)
    with pytest.raises(NotAuthenticated):
        await submitted(queue, alice)
    assert await queue.recent("alice", 10) == []


async def test_t34_many_submits_at_once_keep_within_every_limit(queue: Queue, table: KeyTable) -> None:
    for limit in ("per_minute", "max_queued", "daily_requests"):
        by = await keyed(table, limit, **{limit: 7})
        results = await asyncio.gather(*(submitted(queue, by) for _ in range(60)), return_exceptions=True)
        assert sum(isinstance(each, str) for each in results) == 7
        assert sum(isinstance(each, RequestError) for each in results) == 53


@pytest.mark.parametrize("error", [TooManyRequests("slow down", 7), QuotaSpent("tomorrow", 9)])
def test_when_to_come_again_survives_the_way_between_processes(error: DarkroomError) -> None:
    import pickle

    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.message, again.retry_after_s) == (
        type(error),
        error.message,
        error.retry_after_s,
    )


# --- the audit ---


async def rows_of(audit: Audit, subject: str) -> list[tuple[Action, Actor]]:
    """What was done to a request or a key, the oldest first."""
    found = [each for each in await audit.newest(1000) if each.subject == subject]
    return [(each.action, Actor(each.tenant, each.key_id, each.address)) for each in found[::-1]]


async def test_t37_each_change_is_written_down_once(
    queue: Queue, table: KeyTable, audit: Audit, clock: Clock
) -> None:
    alice, mallory = Actor("alice", "key-1", "192.0.2.7"), Actor("mallory", "key-2", "192.0.2.9")
    done = await submitted(queue, alice)
    [claim] = await queue.claim("flux", "here", 1)
    running = await submitted(queue, alice)
    await queue.claim("flux", "here", 1)
    waiting = await submitted(queue, alice)
    await queue.finish(claim, JobResult.success(OUTPUT, 0.5))
    for _ in range(3):  # only the first changes anything
        assert await queue.cancel(done, "alice", alice) == CancelOutcome.ALREADY_COMPLETED
        assert await queue.cancel(running, "alice", alice) == CancelOutcome.REQUESTED
        await queue.cancel(waiting, "alice", alice)
        await queue.cancel(waiting, "mallory", mallory)
        await queue.erase(done, "mallory", mallory)
        await queue.erase(done, "alice", alice)
    assert await rows_of(audit, done) == [(Action.SUBMIT, alice), (Action.ERASE, alice)]
    for cancelled in (running, waiting):
        assert await rows_of(audit, cancelled) == [(Action.SUBMIT, alice), (Action.CANCEL, alice)]
    assert await audit.newest(100, "mallory") == []


async def test_t37_what_the_server_cancels_for_a_caller_that_left_is_told_apart(
    queue: Queue, audit: Audit
) -> None:
    alice = Actor("alice", "key-1", "192.0.2.7")
    request_id = await submitted(queue, alice)
    await queue.cancel(request_id, "alice")
    assert await rows_of(audit, request_id) == [(Action.SUBMIT, alice), (Action.CANCEL, Actor("alice"))]


async def test_t37_keys_are_written_down_without_what_opens(table: KeyTable, audit: Audit) -> None:
    key, secret = await table.create("alice", "shop")
    for _ in range(2):
        await table.revoke(key.key_id)
    await table.revoke("nobody")
    by = Actor("alice")
    assert await rows_of(audit, key.key_id) == [(Action.CREATE_KEY, by), (Action.REVOKE_KEY, by)]
    assert not {secret, key.digest} & {
        str(value) for each in await audit.newest(9) for value in asdict(each).values()
    }


async def test_t37_a_webhook_that_is_sent_again_is_written_down(queue: Queue, audit: Audit) -> None:
    outbox = Outbox(queue._database, 60, queue.now)
    job = make_job(tenant="alice", webhook_url="https://example.com/hook")
    await queue.submit(job)
    await queue.cancel(job.request_id, "alice")
    assert await outbox.redeliver(str(uuid4())) is None
    assert await outbox.redeliver(job.request_id) == DeliveryState.DUE
    await outbox.claim({"example.com": 1})
    assert await outbox.redeliver(job.request_id) == DeliveryState.SENDING  # is left as it is
    actions = [action for action, by in await rows_of(audit, job.request_id) if by == Actor("alice")]
    assert actions == [Action.SUBMIT, Action.CANCEL, Action.REDELIVER]


async def test_t37_the_newest_rows_come_first_and_are_numbered(queue: Queue, audit: Audit) -> None:
    ids = [await submitted(queue, Actor(name)) for name in ("alice", "bob", "alice")]
    found = await audit.newest(2)
    assert [each.subject for each in found] == ids[:0:-1]
    assert found[0].seq > found[1].seq
    assert [each.subject for each in await audit.newest(9, "alice")] == [ids[2], ids[0]]


def test_a_key_says_whether_a_submit_has_to_be_counted() -> None:
    assert not Key("id", "alice", "digest", allowance=Allowance(Priority.LOW)).allowance.counts
    assert Allowance(daily_requests=1).counts


async def test_t34_limits_hold_over_every_process_that_takes_requests(queue_url: str) -> None:
    gateways, table = [open_queue(queue_url, LeaseSettings()) for _ in range(3)], open_keys(queue_url)
    by = await keyed(table, per_minute=20, max_queued=7)
    calls = [submitted(queue, by) for queue in gateways for _ in range(20)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(each, str) for each in results) == 7
    assert {type(each) for each in results} == {str, QueueFull}
    await table.close()
    for queue in gateways:
        await queue.close()
