"""Any sequence of the queue's verbs, on every store, beside a model that has no database.

`make fuzz` looks much longer, and each time elsewhere.
"""

import asyncio
import os
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, delete, select

from deployments.queue import Outbox, Queue, Setback, open_database
from deployments.queue.database import Database
from deployments.queue.tables import events, metadata
from schemas.deliveries import Delivery, DeliveryState, Outcome
from schemas.errors import (
    BadRequest,
    Cancelled,
    DarkroomError,
    Erased,
    KeyReused,
    NotReady,
    QueueFull,
    StartTimeout,
    WorkerLost,
)
from schemas.jobs import CancelOutcome, Claim, Job, JobResult, Logged, Once, Previewed, Priority, State
from schemas.settings import LeaseSettings, Retention
from tests.support import queue_model as model
from tests.support.jobs import ENDPOINT, Clock
from tests.support.queue_model import Book, Request

T = TypeVar("T")

EXAMPLES = os.environ.get("DARKROOM_FUZZ")
LEASE = LeaseSettings(
    lease_s=model.LEASE_S,
    heartbeat_s=10,
    max_crashes=model.MAX_CRASHES,
    max_attempts=model.MAX_ATTEMPTS,
    backoff_s=model.BACKOFFS_S[1],
)
TENANTS = ("alice", "bob")
MODELS = ("flux", "sdxl")
OWNERS = ("one", "two")
HOST = "there.example"
ENDS: dict[str, type[DarkroomError]] = {"cancelled": Cancelled, "too late": StartTimeout, "lost": WorkerLost}
SETBACKS = {  # whether it counts as a start, whether as a crash
    Setback.UNSTARTED: (False, False),
    Setback.RETURNED: (False, False),
    Setback.CRASHED: (True, True),
    Setback.LAPSED: (True, False),
}
SEQUENCES = {"sqlite": 80, "postgresql": 30}

machine_settings = settings(
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Store:
    """A queue that is used again and again, from code that does not wait by itself."""

    runner: asyncio.Runner
    database: Database
    queue: Queue
    outbox: Outbox
    clock: Clock

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def empty(self) -> None:
        self.clock.now = Clock.now

        def operation(connection: Connection) -> None:
            for table in metadata.sorted_tables:
                connection.execute(delete(table))

        self.run(self.database.write(operation))


@pytest.fixture
def store(queue_url: str) -> Iterator[Store]:
    async def opened() -> Store:
        clock, database = Clock(), open_database(queue_url)
        keep = Retention.model_construct(results_s=model.KEEP_S)  # shorter than may be set
        queue = Queue(database, LEASE, keep, clock=clock)
        return Store(runner, database, queue, Outbox(database, model.WEBHOOK_LEASE_S, clock), clock)

    with asyncio.Runner() as runner:
        store = runner.run(opened())
        yield store
        runner.run(store.queue.close())


class QueueMachine(RuleBasedStateMachine):
    ids = Bundle("ids")  # of requests
    claims = Bundle("claims")
    deliveries = Bundle("deliveries")

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.queue, self.outbox, self.clock, self.run = store.queue, store.outbox, store.clock, store.run
        self.database = store.database
        self.book = Book()
        self.led: tuple[str, float] | None = None  # who was told last that it leads, and when
        store.empty()

    @property
    def now(self) -> float:
        return self.clock.now

    # --- callers ---

    @initialize(
        target=ids,
        first=st.lists(
            st.tuples(st.sampled_from(TENANTS), st.sampled_from(Priority)), min_size=2, max_size=6
        ),
    )
    def begin(self, first: list[tuple[str, Priority]]) -> Any:
        """Some wait from the start: most rules need one."""
        return multiple(*(self._submit(self._job(tenant, priority=priority)) for tenant, priority in first))

    @rule(
        target=ids,
        tenant=st.sampled_from(TENANTS),
        name=st.sampled_from(("flux", "flux", "sdxl")),
        priority=st.sampled_from(Priority),
        start_timeout_s=st.sampled_from((None, None, 5.0, 40.0)),
        has_webhook=st.booleans(),
        max_retries=st.sampled_from((None, None, 0, 1, 20)),
        stores_io=st.booleans(),
        max_ahead=st.sampled_from((None, None, None, 2)),
        key=st.sampled_from((None, None, "k", "l")),
        asked=st.sampled_from(("a cat", "a cat", "a dog")),
    )
    def submit(
        self,
        tenant: str,
        name: str,
        priority: Priority,
        start_timeout_s: float | None,
        has_webhook: bool,
        max_retries: int | None,
        stores_io: bool,
        max_ahead: int | None,
        key: str | None,
        asked: str,
    ) -> Any:
        job = self._job(
            tenant,
            model=name,
            priority=priority,
            start_timeout_s=start_timeout_s,
            webhook_url=f"https://{HOST}/hook" if has_webhook else None,
            max_retries=max_retries,
            stores_io=stores_io,
        )
        request_id = self._submit(job, max_ahead, None if key is None else Once(key, asked))
        return multiple() if request_id is None else request_id

    def _job(self, tenant: str, **fields: Any) -> Job:
        known = {"endpoint_id": ENDPOINT, "model": "flux", "input": {"prompt": "a cat"}}
        return Job(request_id=str(uuid4()), tenant=tenant, **{**known, **fields})

    def _submit(self, job: Job, max_ahead: int | None = None, once: Once | None = None) -> str | None:
        """The new request's id, or None where there is no new one."""
        known = None if once is None else self.book.known(job.tenant, once.key, self.now)
        submit = self.queue.submit(job, (), max_ahead, once)
        if once is not None and known is not None:
            asked, request = known
            if asked != once.fingerprint:
                with pytest.raises(KeyReused):
                    self.run(submit)
                return None
            receipt = self.run(submit)
            waits = request.state == State.QUEUED
            assert receipt.replayed and receipt.request_id == request.job.request_id
            assert receipt.position == (self.book.position(request) if waits else 0)
            return None
        request = self.book.accept(job, self.now)
        position = self.book.position(request)
        if max_ahead is not None and position > max_ahead:
            del self.book.requests[job.request_id]
            with pytest.raises(QueueFull):
                self.run(submit)
            return None
        receipt = self.run(submit)
        assert (receipt.request_id, receipt.position, receipt.replayed) == (job.request_id, position, False)
        if once is not None:
            self.book.keys[job.tenant, once.key] = (once.fingerprint, job.request_id, self.now)
        return job.request_id

    @rule(
        request_id=st.one_of(ids, claims.map(lambda claim: claim.job.request_id)),
        is_own=st.sampled_from((True, True, False)),
    )
    def cancel(self, request_id: str, is_own: bool) -> None:
        request = self.book.requests.get(request_id)
        tenant = request.job.tenant if request is not None and is_own else "carol"
        outcome = self.run(self.queue.cancel(request_id, tenant))
        if request is None or not is_own:
            assert outcome == CancelOutcome.NOT_FOUND
        elif request.state == State.COMPLETED:
            assert outcome == CancelOutcome.ALREADY_COMPLETED
        else:
            assert outcome == CancelOutcome.REQUESTED
            if request.state == State.QUEUED:
                self.book.end(request, "cancelled", self.now)
            else:
                request.cancel_asked = True

    @rule(request_id=ids, is_own=st.sampled_from((True, True, False)))
    def erase(self, request_id: str, is_own: bool) -> None:
        request = self.book.requests.get(request_id)
        if request is None or not is_own:
            assert self.run(self.queue.erase(request_id, "carol")) is None
            return
        erasing = self.queue.erase(request_id, request.job.tenant)
        if request.state != State.COMPLETED or self.book.owes(request_id):
            with pytest.raises(BadRequest):
                self.run(erasing)
            return
        was = self.run(erasing)
        assert was is not None and was.job.request_id == request_id
        self.book.erase(request)

    # --- dispatchers ---

    @rule(
        target=claims,
        name=st.sampled_from(("flux", "flux", "sdxl")),
        owner=st.sampled_from(OWNERS),
        limit=st.sampled_from((1, 1, 2, 10)),
    )
    def claim(self, name: str, owner: str, limit: int) -> Any:
        expected = self.book.startable(name, self.now)[:limit]
        found = self.run(self.queue.claim(name, owner, limit))
        assert [each.job for each in found] == [each.job for each in expected]
        for claim, request in zip(found, expected, strict=True):
            assert claim.start_deadline == request.deadline
            assert request.deadline is None or self.now < request.deadline
            assert claim.fence > request.fence, "a fence that is not new"
            self.book.start(request, owner, self.now)
            request.fence = claim.fence
            assert claim.attempt == request.attempts <= model.MAX_ATTEMPTS
        return multiple(*found)

    @rule(
        given=st.lists(
            claims, min_size=1, max_size=3, unique_by=lambda claim: (claim.job.request_id, claim.fence)
        )
    )
    def heartbeat(self, given: list[Claim]) -> None:
        held = [each for each in map(self._held, given) if each is not None]
        renewed = self.run(self.queue.heartbeat(given))
        assert renewed == {each.job.request_id for each in held}
        for request in held:
            request.lease_until = self.now + model.LEASE_S

    @rule(claim=claims)
    def set_to_work(self, claim: Claim) -> None:
        request = self._held(claim)
        assert self.run(self.queue.begin(claim)) == (request is not None)
        if request is not None:
            request.deadline = None

    @rule(claim=claims, has_preview=st.booleans())
    def record(self, claim: Claim, has_preview: bool) -> None:
        line = f"at {self.now}"
        news = (Logged(line), Previewed({"images": []})) if has_preview else (Logged(line),)
        request = self._held(claim)
        assert self.run(self.queue.record(claim, news)) == (request is not None)
        if request is not None:
            request.log.append(line)

    @rule(claim=claims, how=st.sampled_from(("success", "success", "refused", "passing")))
    def finish(self, claim: Claim, how: str) -> None:
        result = {
            "success": JobResult.success({"images": [], "seed": claim.fence}, 0.5),
            "refused": JobResult.failure(BadRequest(f"not {claim.fence}")),
            "passing": JobResult.failure(NotReady("not now")),
        }[how]
        request = self._held(claim)
        assert self.run(self.queue.finish(claim, result, (Logged("the end"),))) == (request is not None)
        if request is not None:
            request.log.append("the end")
            request.wanted = result
            self.book.end(request, "cancelled" if request.cancel_asked else "its result", self.now)

    @rule(claim=claims, setback=st.sampled_from(Setback), delay_s=st.sampled_from((0.0, 3.0)))
    def release(self, claim: Claim, setback: Setback, delay_s: float) -> None:
        request = self._held(claim)
        assert self.run(self.queue.release(claim, setback, delay_s)) == (request is not None)
        if request is not None:
            counts, crashed = SETBACKS[setback]
            self.book.put_back(request, counts=counts, crashed=crashed, delay_s=delay_s, now=self.now)

    def _held(self, claim: Claim) -> Request | None:
        return self.book.held(claim.job.request_id, claim.fence)

    @rule(owner=st.sampled_from(OWNERS))
    def look(self, owner: str) -> None:
        """What a dispatcher has to do."""
        waiting = self.run(self.queue.waiting(owner, MODELS))
        assert waiting.models == {each for each in MODELS if self.book.startable(each, self.now)}
        stopped = [each for each in self.book.running() if each.cancel_asked and each.owner == owner]
        assert waiting.cancelled == {each.job.request_id for each in stopped}
        queued = [each for name in MODELS for each in self.book.queued(name)]
        due = [each.deadline for each in queued if each.deadline is not None]
        due += [each.rests_until for each in queued if each.rests_until > self.now]
        assert waiting.next_due == min(due, default=None)

    @rule(owner=st.sampled_from(OWNERS))
    def lead(self, owner: str) -> None:
        """Who is told that it leads does so for a while, and who falls silent is followed."""
        leads = self.run(self.queue.leads("sweep", owner))
        if self.led is not None:
            leader, at = self.led
            if leader == owner or self.now - at > 5:
                assert leads
            elif self.now - at <= 2.5:
                assert not leads, "two lead"
        else:
            assert leads
        if leads:
            self.led = owner, self.now

    # --- time ---

    @rule(
        seconds=st.sampled_from(
            (0.5, 2.0, 5.0, 9.0, 31.0, 31.0, model.HOUR_S, model.KEEP_S, model.KEY_S + 1)
        ),
        sweeps=st.booleans(),
    )
    def tick(self, seconds: float, sweeps: bool) -> None:
        self.clock.now += seconds
        if sweeps:
            self.sweep()

    @rule()
    def sweep(self) -> None:
        assert self.run(self.queue.sweep()) == self.book.sweep(self.now)
        assert self.run(self.queue.sweep()) == 0, "a sweep left something that was due"

    # --- webhooks ---

    @rule(target=deliveries, room=st.sampled_from((1, 2, 10)))
    def claim_webhooks(self, room: int) -> Any:
        hosts = self.run(self.outbox.due_hosts())
        found = self.run(self.outbox.claim({HOST: room}))
        due = self.book.due_webhooks(self.now)
        assert hosts == ([HOST] if due else [])
        taken = [self.book.webhooks[each.request_id] for each in found]
        assert [each.due_at for each in taken] == [each.due_at for each in due[:room]]
        for delivery, webhook in zip(found, taken, strict=True):
            assert webhook.state == DeliveryState.DUE, "two hold one webhook"
            self.book.send(webhook, self.now)
            request = self.book.requests[delivery.request_id]
            assert (delivery.attempt, delivery.retries) == (webhook.attempts, webhook.retries)
            if not request.is_erased:
                assert request.seen is not None
                assert (delivery.status, delivery.body) == (request.seen.status, request.seen.body)
        return multiple(*found)

    @rule(delivery=deliveries, how=st.sampled_from(("delivered", "failed", "later", "given back")))
    def settle(self, delivery: Delivery, how: str) -> None:
        webhook = self.book.last_try(delivery.request_id, delivery.attempt)
        outcome = Outcome(200 if how == "delivered" else 500, None, 0.1)
        if how == "given back":
            told = self.run(self.outbox.release(delivery, outcome))
        elif how == "later":
            then = self.now + 10
            told = self.run(self.outbox.settle(delivery, outcome, DeliveryState.DUE, then))
        else:
            told = self.run(self.outbox.settle(delivery, outcome, DeliveryState(how)))
        assert told == (webhook is not None)
        if webhook is None:
            return
        if how == "given back":
            webhook.state, webhook.due_at = DeliveryState.DUE, self.now
        elif how == "later":
            webhook.state, webhook.due_at = DeliveryState.DUE, self.now + 10
            webhook.retries = delivery.retries + 1
        else:
            webhook.state = DeliveryState(how)

    @rule(request_id=ids)
    def redeliver(self, request_id: str) -> None:
        webhook = self.book.webhooks.get(request_id)
        was = self.run(self.outbox.redeliver(request_id))
        assert was == (None if webhook is None else webhook.state)
        if webhook is not None and webhook.state != DeliveryState.SENDING:
            webhook.state, webhook.due_at, webhook.retries = DeliveryState.DUE, self.now, 0

    # --- what is true after every step ---

    @invariant()
    def every_request_is_as_it_should_be(self) -> None:
        for tenant in TENANTS:
            expected = self.book.of_tenant(tenant)
            found = self.run(self.queue.recent(tenant, 1000))
            assert [each.job.request_id for _, each in found] == [each.job.request_id for each in expected]
            for (_, record), request in zip(found, expected, strict=True):
                assert record.state == request.state
                assert record.attempts == request.attempts <= model.MAX_ATTEMPTS
                assert record.accepted_at == request.accepted_at
                assert record.cancel_requested == request.cancel_asked
                assert record.job.input == ({} if request.is_erased else request.job.input)
                self._check_result(request, record.result)

    def _check_result(self, request: Request, result: JobResult | None) -> None:
        if request.end is None:
            assert result is None
            return
        assert result is not None
        if request.is_erased:
            assert result == JobResult.failure(Erased())
        elif request.seen is not None:
            assert result == request.seen, "a result has changed"
        elif request.end == "its result":
            assert result == request.wanted
        else:
            assert result.error_type == ENDS[request.end].error_type and result.status >= 400
        request.seen = request.seen or result

    @invariant()
    def every_position_is_true(self) -> None:
        for name in MODELS:
            queued = self.book.queued(name)
            for place, request in [*enumerate(queued)][-1:]:
                record = self.run(self.queue.get(request.job.request_id, request.job.tenant))
                assert record is not None and record.position == place
            upcoming = self.run(self.queue.upcoming(name, 1000))
            assert upcoming == [each.job for each in self.book.startable(name, self.now)]

    @invariant()
    def webhooks_are_owed_where_they_were_asked_for(self) -> None:
        """For each end one, and for nothing else."""
        found = self.run(self.outbox.newest(1000))
        assert {each.request_id: each.state for each in found} == {
            request_id: webhook.state for request_id, webhook in self.book.webhooks.items()
        }
        assert len(found) == len(self.book.webhooks)

    @invariant()
    def nothing_is_left_of_what_was_forgotten(self) -> None:
        with_events = select(events.c.request_id).distinct()
        found = self.run(self.database.read(lambda connection: connection.scalars(with_events).all()))
        assert self.book.requests.keys() >= set(found)

    @rule(request_id=ids)
    def read(self, request_id: str) -> None:
        """All that hangs on one request."""
        request, webhook = self.book.requests.get(request_id), self.book.webhooks.get(request_id)
        told = self.run(self.outbox.find(request_id))
        told_events = self.run(self.queue.events(request_id))
        assert self.run(self.queue.get(request_id, "carol")) is None, "another tenant sees it"
        assert (told is None) == (webhook is None)
        if webhook is not None and told is not None:
            record, tries = told
            assert (record.state, record.attempts) == (webhook.state, webhook.attempts)
            assert (record.ended_at is None) == webhook.is_owed
            assert [each.attempt for each in tries] == [*range(1, webhook.attempts + 1)]
        if request is None:
            assert not told_events, "something is left of what was forgotten"
            return
        lines = [each.event.message for each in told_events if isinstance(each.event, Logged)]
        assert lines == request.log
        assert len(lines) == len(told_events) or request.state != State.COMPLETED, "a preview is left"


def test_any_sequence_of_verbs_does_what_the_model_says(store: Store, queue_url: str) -> None:
    count = int(EXAMPLES) // 20 if EXAMPLES else SEQUENCES[queue_url.partition(":")[0]]

    class OnStore(QueueMachine):
        def __init__(self) -> None:
            super().__init__(store)

    run_state_machine_as_test(OnStore, settings=settings(machine_settings, max_examples=count))
