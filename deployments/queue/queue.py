"""The durable queue. Its rows are the truth: what is not in them did not happen.

The life of a request: submit → queued → claim → running → finish → completed. A claim holds it under
a lease that heartbeats renew; each claim raises the fence, and a write with an older fence is refused,
so that a worker which was thought dead cannot speak. A lost lease or worker puts the request back at
its old place, until it has cost `max_crashes` workers or has been started `max_attempts` times.

The order of a model's requests: by priority, then in turns among the tenants, and of one tenant in the
order of acceptance.
"""

import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, Select
from sqlalchemy.exc import IntegrityError

from deployments import crash, endings
from deployments.queue import audit, limits, lookup, rows, upkeep
from deployments.queue import statements as sql
from deployments.queue.database import Database, Operation
from deployments.queue.feed import Feed
from deployments.queue.submit import Submit
from deployments.queue.transitions import Setback, append, change, complete, erase, held, note, put_back, take
from schemas.access import Action, Actor
from schemas.errors import BadRequest, Cancelled, Erased, RequestError
from schemas.jobs import (
    CancelOutcome,
    Claim,
    Event,
    Job,
    JobEvent,
    JobResult,
    Once,
    Priority,
    Receipt,
    Record,
    Snapshot,
    State,
)
from schemas.settings import LeaseSettings, Retention

T = TypeVar("T")

LEAD_S = 5.0  # a leader that is not heard of for so long is followed by another


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a dispatcher has to do now."""

    models: frozenset[str]  # with requests that may start
    cancelled: frozenset[str]  # request ids it runs that their callers gave up
    next_due: float | None  # when a start deadline or a backoff ends, by the clock


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests of a model and priority wait, or run."""

    model: str
    priority: Priority
    state: State
    count: int
    since: float  # when the oldest was accepted


class Queue:
    """All verbs of the queue, on any database. `clock` gives seconds since the epoch."""

    def __init__(
        self,
        database: Database,
        lease: LeaseSettings,
        keep: Retention | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._lease = lease
        self._keep = keep or Retention()
        self._clock = clock
        self._feed = Feed(database)

    @property
    def is_alive(self) -> bool:
        """Whether the database can still be written."""
        return self._database.is_alive

    async def close(self) -> None:
        self._feed.close()
        await self._database.close()

    # --- the caller's side ---

    async def submit(
        self,
        job: Job,
        notes: Sequence[JobEvent] = (),
        max_ahead: int | None = None,
        once: Once | None = None,
        by: Actor | None = None,
        *,
        waits: bool = False,
    ) -> Receipt:
        """Accept a job. When this returns it is on disk and will reach a result. `waits`: it is a run.

        Under a key that is known, the receipt is of the request that came first, and nothing is kept.
        Raises QueueFull, and keeps nothing, when more than `max_ahead` jobs run before it; KeyReused when
        the key came with another input; what limits.admit says when the caller may not submit more.
        """
        submit = Submit(job, notes, max_ahead, once, by or Actor(job.tenant), waits, self._clock())
        receipt = await self._write(submit.accept)
        if isinstance(receipt, RequestError):
            raise receipt
        crash.point("submit.stored")
        self.wake()
        return receipt

    async def get(self, request_id: str, tenant: str) -> Record | None:
        """The record of a tenant's request, or None."""
        return await self._database.read(lambda connection: lookup.find(connection, request_id, tenant))

    async def recent(
        self, tenant: str, limit: int, before: int | None = None, endpoints: Sequence[str] = ()
    ) -> list[tuple[int, Record]]:
        """A tenant's newest requests, newest first, each with its `seq`; those below `before` only."""
        wanted = {"tenant": tenant, "limit": limit, "before": 2**62 if before is None else before}

        def operation(connection: Connection) -> list[tuple[int, Record]]:
            if endpoints:
                found = connection.execute(sql.RECENT_OF, wanted | {"endpoints": list(endpoints)})
            else:
                found = connection.execute(sql.RECENT, wanted)
            return [(row["seq"], rows.record(row, None)) for row in found.mappings()]

        return await self._database.read(operation)

    async def erase(self, request_id: str, tenant: str, by: Actor | None = None) -> Record | None:
        """Delete the input, the output and the log of a completed request. Returns what it was, or None.

        Raises BadRequest while it is not completed, and while its webhook, which tells the output, is owed.
        """
        now = self._clock()

        def operation(connection: Connection) -> Record | None:
            record = lookup.find(connection, request_id, tenant)
            if record is None:
                return None
            if record.state != State.COMPLETED:
                raise BadRequest("The request is still in progress; cancel it first.")
            if connection.scalar(sql.OWED, {"request_id": request_id}) is not None:
                raise BadRequest("The request's webhook is still being delivered; try again later.")
            crash.point("erase.found")
            if record.result is None or record.result.error_type != Erased.error_type:
                erase(connection, request_id)
                audit.note(connection, Action.ERASE, by or Actor(tenant), request_id, now)
            return record

        record = await self._write(operation)
        crash.point("erase.stored")
        return record

    async def events(self, request_id: str, after: int = 0) -> list[Event]:
        """The events of a request with `seq` above `after`, in order."""
        return await self._database.read(lambda connection: lookup.events(connection, request_id, after))

    async def watch(self, request_id: str, tenant: str) -> AsyncIterator[Snapshot]:
        """A snapshot now and after each change, the completed one last. Nothing for an unknown id.

        Each snapshot has the events since the one before.
        """
        seen, after = None, 0
        with self._feed.watched(request_id) as changed:
            while seen is None or seen.state != State.COMPLETED:
                await changed.wait()
                changed.clear()
                record, news = await self._database.read(
                    partial(lookup.snapshot, request_id=request_id, tenant=tenant, after=after)
                )
                if record is None:
                    return
                after = news[-1].seq if news else after
                if news or record != seen:
                    yield Snapshot(record, tuple(news))
                seen = record

    async def cancel(self, request_id: str, tenant: str, by: Actor | None = None) -> CancelOutcome:
        """Give a request up. One that waits ends here; one that runs ends within a step. Without `by` the
        server does it, for a caller that has left."""
        now = self._clock()

        def operation(connection: Connection) -> tuple[CancelOutcome, Record | None]:
            record = lookup.find(connection, request_id, tenant)
            if record is None:
                return CancelOutcome.NOT_FOUND, None
            if record.state == State.COMPLETED:
                return CancelOutcome.ALREADY_COMPLETED, None
            if record.cancel_requested:
                return CancelOutcome.REQUESTED, None
            if record.state == State.QUEUED:
                crash.point("cancel.waits")
                complete(connection, record.job, JobResult.failure(Cancelled()), now)
            else:
                crash.point("cancel.runs")
                change(connection, request_id, cancel_requested=True)
                crash.point("cancel.marked")
                note(connection, request_id, now)
            audit.note(connection, Action.CANCEL, by or Actor(tenant), request_id, now)
            return CancelOutcome.REQUESTED, lookup.find(connection, request_id, tenant)

        outcome, record = await self._write(operation)
        crash.point("cancel.stored")
        if record is not None:
            endings.tell(record)
        self.wake()
        return outcome

    # --- the dispatcher's side ---

    async def changed(self, timeout_s: float) -> None:
        """Wait until something in the queue may have changed."""
        await self._database.changed(timeout_s)

    def wake(self) -> None:
        """Make `changed` return in this process."""
        self._database.wake()

    def now(self) -> float:
        """The queue's clock, seconds since the epoch."""
        return self._clock()

    async def waiting(self, owner: str, models: Collection[str]) -> Waiting:
        """What a dispatcher named `owner` has to do now for these models."""
        now = self._clock()

        def operation(connection: Connection) -> Waiting:
            due = [
                connection.scalar(sql.NEXT_DEADLINE),
                connection.scalar(sql.NEXT_BACKOFF, {"now": now}),
            ]
            return Waiting(
                frozenset(each for each in models if _has_work(connection, each, now)),
                frozenset(connection.scalars(sql.CANCELLED, {"owner": owner})),
                min((at for at in due if at is not None), default=None),
            )

        return await self._database.read(operation)

    async def claim(self, model: str, owner: str, limit: int, low_limit: int | None = None) -> list[Claim]:
        """Up to `limit` requests of a model, in their order; of a tenant no more than may run at once.

        Up to `low_limit` of them are of low priority.
        """

        def is_any(connection: Connection) -> bool:
            heads = sql.UPCOMING, sql.UPCOMING_BESIDE
            return bool(_takeable(connection, heads, model, self._clock(), 1, low_limit))

        # A transaction rings everywhere, also one that changes nothing: who is rung looks, and would claim
        # in vain as well, and ring, for ever.
        if not await self._database.read(is_any):
            return []

        def operation(connection: Connection) -> list[Claim]:
            now = self._clock()
            heads = sql.CLAIMABLE, sql.CLAIMABLE_BESIDE
            found = _takeable(connection, heads, model, now, limit, low_limit)
            crash.point("claim.found")
            until = now + self._lease.lease_s
            return [take(connection, row, owner, now, until) for row in found]

        claims = await self._write(operation)
        crash.point("claim.stored")
        return claims

    async def upcoming(self, model: str, limit: int) -> list[Job]:
        """The jobs that the next `claim` of so many would take. Takes none of them."""
        wanted = {"model": model, "now": self._clock(), "limit": limit}

        def operation(connection: Connection) -> list[Job]:
            return [rows.job(row) for row in connection.execute(sql.UPCOMING, wanted).mappings()]

        return await self._database.read(operation)

    async def backlog(self, model: str, priority: Priority, limit: int) -> int:
        """How many requests of a model and priority may start and wait, counted up to `limit`."""
        wanted = {"model": model, "priority": priority, "now": self._clock(), "limit": limit}

        def operation(connection: Connection) -> int:
            return connection.scalar(sql.BACKLOG, wanted) or 0

        return await self._database.read(operation)

    async def loads(self) -> list[Load]:
        """What waits and runs, by model and priority. Reads all of it: for a look every few seconds."""

        def operation(connection: Connection) -> list[Load]:
            return [
                Load(model, Priority(priority), State(state), count, since)
                for model, priority, state, count, since in connection.execute(sql.LOADS)
            ]

        return await self._database.read(operation)

    async def heartbeat(self, claims: Sequence[Claim]) -> frozenset[str]:
        """Renew the leases of these claims. Returns the request ids of those that still hold."""

        def operation(connection: Connection) -> frozenset[str]:
            until = self._clock() + self._lease.lease_s  # now, not when the write began to wait
            renewed = [
                connection.scalar(
                    sql.RENEW,
                    {"of": claim.job.request_id, "fence_held": claim.fence, "until": until},
                )
                for claim in claims
            ]
            crash.point("heartbeat.renewed")
            return frozenset(request_id for request_id in renewed if request_id is not None)

        held = await self._write(operation)
        crash.point("heartbeat.stored")
        return held

    async def begin(self, claim: Claim) -> bool:
        """A worker has begun, so the start deadline is met for good. False when the claim is lost."""

        def operation(connection: Connection) -> bool:
            if held(connection, claim) is None:
                return False
            change(connection, claim.job.request_id, start_deadline=None)
            return True

        return await self._write(operation)

    async def record(self, claim: Claim, news: Sequence[JobEvent]) -> bool:
        """Store events of a running job. False, and nothing stored, when the claim is lost."""
        now = self._clock()

        def operation(connection: Connection) -> bool:
            if held(connection, claim) is None:
                return False
            crash.point("record.held")
            append(connection, claim.job.request_id, news, now)
            crash.point("record.appended")
            return True

        is_held = await self._write(operation)
        crash.point("record.stored")
        return is_held

    async def finish(self, claim: Claim, result: JobResult, news: Sequence[JobEvent] = ()) -> bool:
        """End a job with its result and owe its webhook, in one transaction.

        A cancel that was acknowledged before wins. False, and nothing changed, when the claim is lost.
        """
        now = self._clock()

        def operation(connection: Connection) -> bool:
            row = held(connection, claim)
            if row is None:
                return False
            crash.point("finish.held")
            append(connection, claim.job.request_id, news, now)
            crash.point("finish.appended")
            outcome = JobResult.failure(Cancelled()) if row["cancel_requested"] else result
            complete(connection, claim.job, outcome, now)
            crash.point("finish.completed")
            return True

        is_held = await self._write(operation)
        crash.point("finish.stored")
        return is_held

    async def release(self, claim: Claim, setback: Setback, delay_s: float = 0) -> bool:
        """Give a claim back unfinished, to be claimed again after `delay_s`, or the backoff after a crash.

        False, and nothing changed, when the claim is lost.
        """
        now = self._clock()

        def operation(connection: Connection) -> bool:
            row = held(connection, claim)
            if row is None:
                return False
            crash.point("release.held")
            put_back(connection, row, setback, self._lease, now, delay_s)
            return True

        is_held = await self._write(operation)
        crash.point("release.stored")
        return is_held

    async def leads(self, role: str, owner: str) -> bool:
        """Whether `owner` is the one that does this now; whoever asks no more is followed by another."""
        now = self._clock()
        place = {"of_role": role, "by": owner, "now": now, "until": now + LEAD_S}
        leader = await self._database.read(lambda connection: connection.execute(sql.LEADER, place).first())
        if leader is not None and leader.owner != owner and leader.lease_until >= now:
            return False
        if leader is not None and leader.owner == owner and leader.lease_until > now + LEAD_S / 2:
            return True

        def operation(connection: Connection) -> bool:
            if leader is None:
                connection.execute(sql.FIRST_LEADER, {"role": role, "owner": "", "lease_until": 0.0})
                crash.point("lead.founded")
            is_leader = connection.scalar(sql.LEAD, place) is not None
            crash.point("lead.taken")
            return is_leader

        try:
            is_leader = await self._database.write(operation)
        except IntegrityError:  # another was the first
            return False
        crash.point("lead.stored")
        return is_leader

    async def sweep(self) -> int:
        """Do what time has made due: leases that lapsed, starts that were missed, results kept long enough.

        Returns how many requests changed. Of each kind at most a batch: whoever sweeps again gets the rest.
        """
        now = self._clock()
        times = upkeep.times(now, self._keep)
        if not await self._database.read(lambda connection: connection.scalar(sql.ANY_UPKEEP, times)):
            return 0
        swept = await self._write(lambda connection: upkeep.sweep(connection, self._lease, times))
        crash.point("sweep.stored")
        for record in swept.ended:
            endings.tell(record)
        return swept.count

    async def reroute(self, routes: Mapping[str, str]) -> None:
        """Move what waits to the models that serve its endpoints now (endpoint id → model)."""

        def operation(connection: Connection) -> None:
            for endpoint_id, model in routes.items():
                connection.execute(sql.REROUTE, {"endpoint": endpoint_id, "to_model": model})
                crash.point("reroute.moved")

        await self._write(operation)
        crash.point("reroute.stored")

    # --- inside ---

    async def _write(self, operation: Operation[T]) -> T:
        """A transaction. Other processes hear of it by themselves, watchers in this one from here."""
        result = await self._database.write(operation)
        if self._feed.is_watched:
            self.wake()
        return result


def _takeable(
    connection: Connection,
    heads: tuple[Select[Any], Select[Any]],
    model: str,
    now: float,
    limit: int,
    low_limit: int | None,
) -> list[RowMapping]:
    """The next requests of a model that may run now, in their order. `heads`: the statement that finds them,
    and the one for when some tenants are full."""
    rooms = limits.rooms(connection)
    full = [tenant for tenant, room in rooms.items() if room <= 0]
    wanted = {"model": model, "now": now, "limit": limit, "full": full}
    found = connection.execute(heads[bool(full)], wanted).mappings().all()
    return list(limits.within(found, rooms, low_limit))


def _has_work(connection: Connection, model: str, now: float) -> bool:
    return connection.scalar(sql.ANY_CLAIMABLE, {"model": model, "now": now}) is not None
