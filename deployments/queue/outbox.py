"""The webhooks that are owed: written where a request ends, kept until a receiver has taken them.

A webhook is due → claimed → sending → delivered, or due again, or failed. A claim holds it under a
lease: if its sender dies, it falls due when the lease ends, and two senders never hold it at once.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import (
    BindParameter,
    Connection,
    RowMapping,
    and_,
    bindparam,
    insert,
    select,
    union,
    update,
)

from deployments import crash
from deployments.queue import audit, rows
from deployments.queue.database import Database
from deployments.queue.tables import deliveries, requests, tries
from schemas.access import Action, Actor
from schemas.deliveries import Delivery, DeliveryRecord, DeliveryState, Outcome, Try
from schemas.errors import Erased

_now: BindParameter[float] = bindparam("now")
_ripe = and_(deliveries.c.state == DeliveryState.DUE, deliveries.c.next_attempt_at <= _now)
_lapsed = and_(deliveries.c.state == DeliveryState.SENDING, deliveries.c.lease_until <= _now)
_of_request = deliveries.c.request_id == bindparam("request_id")

# Two walks along one index, which `or` would make look at every row.
DUE_HOSTS = union(
    select(deliveries.c.host).where(_ripe).distinct(), select(deliveries.c.host).where(_lapsed).distinct()
)

REVIVE = (
    update(deliveries)
    .where(_lapsed)
    .values(state=DeliveryState.DUE, next_attempt_at=deliveries.c.lease_until)
)

CLAIMABLE = (
    select(deliveries, requests.c.tenant, requests.c.status, requests.c.body, requests.c.traceparent)
    .join(requests, requests.c.request_id == deliveries.c.request_id)
    .where(_ripe, deliveries.c.host == bindparam("of_host"))
    .order_by(deliveries.c.next_attempt_at, deliveries.c.seq)
    .limit(bindparam("room"))
    .with_for_update(skip_locked=True, of=deliveries)
)

SET = update(deliveries).where(deliveries.c.seq == bindparam("of"))

# Change a webhook whose try this still is: also one whose lease has lapsed, until someone else claims it.
SET_HELD = SET.where(
    deliveries.c.attempts == bindparam("attempt_held"),
    deliveries.c.state.in_([DeliveryState.SENDING, DeliveryState.DUE]),
).returning(deliveries.c.seq)

BEGIN_TRY = insert(tries)
END_TRY = update(tries).where(tries.c.delivery == bindparam("of"), tries.c.attempt == bindparam("number"))

FIND = select(deliveries).where(_of_request)
REQUEST = select(requests.c.tenant, requests.c.error_type).where(
    requests.c.request_id == bindparam("request_id")
)
LOG = (
    select(tries)
    .join(deliveries, deliveries.c.seq == tries.c.delivery)
    .where(_of_request)
    .order_by(tries.c.seq)
)
NEWEST = select(deliveries).order_by(deliveries.c.seq.desc()).limit(bindparam("limit"))
NEWEST_IN = NEWEST.where(deliveries.c.state == bindparam("wanted"))


class Outbox:
    """The verbs of webhooks, on any database. `clock` gives seconds since the epoch."""

    def __init__(self, database: Database, lease_s: float, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._lease_s = lease_s
        self._clock = clock

    @property
    def is_alive(self) -> bool:
        """Whether the database can still be written."""
        return self._database.is_alive

    async def close(self) -> None:
        await self._database.close()

    async def changed(self, timeout_s: float) -> None:
        """Wait until something may have fallen due."""
        await self._database.changed(timeout_s)

    def wake(self) -> None:
        """Make `changed` return in this process."""
        self._database.wake()

    def now(self) -> float:
        """The clock, seconds since the epoch."""
        return self._clock()

    # --- the sender's side ---

    async def due_hosts(self) -> list[str]:
        """The hosts that something is due for."""
        now = self._clock()
        return await self._database.read(lambda connection: list(connection.scalars(DUE_HOSTS, {"now": now})))

    async def claim(self, rooms: Mapping[str, int]) -> list[Delivery]:
        """What is due for these hosts, at most so many of each, what has waited longest first."""

        def operation(connection: Connection) -> list[Delivery]:
            now = self._clock()
            connection.execute(REVIVE, {"now": now})
            crash.point("outbox.revived")
            found: list[RowMapping] = []
            for host, room in rooms.items():
                wanted = {"now": now, "of_host": host, "room": room}
                found += connection.execute(CLAIMABLE, wanted).mappings().all()
            return [_take(connection, row, now, now + self._lease_s) for row in found]

        claimed = await self._database.write(operation)
        crash.point("outbox.claimed")
        return claimed

    async def settle(
        self,
        delivery: Delivery,
        outcome: Outcome,
        state: DeliveryState,
        next_attempt_at: float | None = None,
    ) -> bool:
        """Write down how a try went, and what becomes of the webhook; one that is due again needs a time.

        False when someone else has taken it meanwhile: then only the log hears of it.
        """
        ended_at = None if state == DeliveryState.DUE else self._clock()
        values: dict[str, Any] = {
            "state": state,
            "last_status": outcome.status,
            "last_error": outcome.error,
            "ended_at": ended_at,
        }
        if next_attempt_at is not None:
            values |= {"next_attempt_at": next_attempt_at, "retries": delivery.retries + 1}

        def operation(connection: Connection) -> bool:
            _end_try(connection, delivery, outcome)
            crash.point("outbox.try_ended")
            return _set_held(connection, delivery, values)

        is_held = await self._database.write(operation)
        crash.point("outbox.settled")
        return is_held

    async def release(self, delivery: Delivery, outcome: Outcome) -> bool:
        """Give a webhook back to be sent at once, by whoever comes next; no retry is used up."""
        values = {"state": DeliveryState.DUE, "next_attempt_at": self._clock()}

        def operation(connection: Connection) -> bool:
            _end_try(connection, delivery, outcome)
            crash.point("outbox.given_back")
            return _set_held(connection, delivery, values)

        is_held = await self._database.write(operation)
        crash.point("outbox.released")
        return is_held

    # --- the operator's side ---

    async def newest(self, limit: int, state: DeliveryState | None = None) -> list[DeliveryRecord]:
        """The webhooks of the requests that ended last, the newest first."""

        def operation(connection: Connection) -> list[DeliveryRecord]:
            wanted: dict[str, Any] = {"limit": limit}
            statement = NEWEST if state is None else NEWEST_IN
            found = connection.execute(statement, wanted | ({"wanted": state} if state else {}))
            return [rows.delivery_record(row) for row in found.mappings()]

        return await self._database.read(operation)

    async def find(self, request_id: str) -> tuple[DeliveryRecord, list[Try]] | None:
        """The webhook of a request and every try of it, or None."""

        def operation(connection: Connection) -> tuple[DeliveryRecord, list[Try]] | None:
            row = connection.execute(FIND, {"request_id": request_id}).mappings().first()
            if row is None:
                return None
            log = connection.execute(LOG, {"request_id": request_id}).mappings()
            return rows.delivery_record(row), [rows.webhook_try(each) for each in log]

        return await self._database.read(operation)

    async def redeliver(self, request_id: str) -> DeliveryState | None:
        """Send a webhook again, at once and with the whole schedule, unless that is under way.

        Returns the state that it was in, None for one that does not exist. Raises Erased for a request
        whose output, which it would tell, has been deleted.
        """
        now = self._clock()

        def operation(connection: Connection) -> DeliveryState | None:
            row = connection.execute(FIND, {"request_id": request_id}).mappings().first()
            if row is None:
                return None
            request = connection.execute(REQUEST, {"request_id": request_id}).one()
            if request.error_type == Erased.error_type:
                raise Erased
            if row["state"] != DeliveryState.SENDING:
                again = {"state": DeliveryState.DUE, "next_attempt_at": now, "retries": 0, "ended_at": None}
                connection.execute(SET, {"of": row["seq"], **again})
                audit.note(connection, Action.REDELIVER, Actor(request.tenant), request_id, now)
                crash.point("outbox.due_again")
            return DeliveryState(row["state"])

        state = await self._database.write(operation)
        crash.point("outbox.redelivered")
        return state


def _take(connection: Connection, row: RowMapping, now: float, lease_until: float) -> Delivery:
    delivery = rows.delivery(row, row["attempts"] + 1)
    held = {"state": DeliveryState.SENDING, "attempts": delivery.attempt, "lease_until": lease_until}
    connection.execute(SET, {"of": delivery.seq, **held})
    crash.point("outbox.taken")
    begun = {"delivery": delivery.seq, "attempt": delivery.attempt, "began_at": now}
    connection.execute(BEGIN_TRY, begun)
    crash.point("outbox.try_begun")
    return delivery


def _set_held(connection: Connection, delivery: Delivery, values: Mapping[str, Any]) -> bool:
    held = {"of": delivery.seq, "attempt_held": delivery.attempt}
    return connection.scalar(SET_HELD, {**held, **values, "lease_until": None}) is not None


def _end_try(connection: Connection, delivery: Delivery, outcome: Outcome) -> None:
    ended = {"status": outcome.status, "error": outcome.error, "duration_s": outcome.duration_s}
    connection.execute(END_TRY, {"of": delivery.seq, "number": delivery.attempt, **ended})
