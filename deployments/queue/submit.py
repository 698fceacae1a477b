"""The acceptance of a request: all of it in one transaction, or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from deployments import crash
from deployments.queue import audit, limits, lookup, rows, upkeep
from deployments.queue import statements as sql
from deployments.queue.transitions import append
from schemas.access import Action, Actor
from schemas.errors import Cancelled, KeyReused, QueueFull, RequestError
from schemas.jobs import Job, JobEvent, Once, Receipt, State

MAX_RECEIPT_POSITION = 1_000  # positions beyond are told as this: the next submit waits for the count


@dataclass(frozen=True, slots=True)
class Submit:
    """A submit as it came; see Queue.submit."""

    job: Job
    notes: Sequence[JobEvent]
    max_ahead: int | None
    once: Once | None
    by: Actor
    waits: bool
    at: float  # by the queue's clock

    def accept(self, connection: Connection) -> Receipt | RequestError:
        """The receipt, or why its tenant may not submit more. Raises QueueFull and KeyReused."""
        job, once = self.job, self.once
        if once is not None and (known := self._receipt_of_the_first(connection, once)) is not None:
            return known
        crash.point("submit.begun")
        if (refusal := limits.admit(connection, self.by, self.at, waits=self.waits)) is not None:
            return refusal
        crash.point("submit.admitted")
        if once is not None:
            self._remember(connection, once)
        audit.note(connection, Action.SUBMIT, self.by, job.request_id, self.at)
        crash.point("submit.audited")
        turn, position = self._place(connection)
        crash.point("submit.turn_drawn")
        connection.execute(sql.ACCEPT, {**self._values(), "turn": turn})
        crash.point("submit.inserted")
        append(connection, job.request_id, self.notes, self.at)
        crash.point("submit.noted")
        return Receipt(job.request_id, position)

    def _place(self, connection: Connection) -> tuple[int, int]:
        """The request's turn among its tenant's, and how many run before it. Raises QueueFull."""
        place = {
            "model": self.job.model,
            "priority": self.job.priority,
            "tenant": self.job.tenant,
            "most": max(MAX_RECEIPT_POSITION, (self.max_ahead or 0) + 1),
        }
        turn, position = connection.execute(sql.PLACE, place).one()
        if self.max_ahead is not None and position > self.max_ahead:
            raise QueueFull(f"{position} requests wait already; at most {self.max_ahead} were wanted.")
        return turn, position

    def _values(self) -> dict[str, object]:
        """The row but for its turn."""
        timeout_s = self.job.start_timeout_s
        return rows.job_values(self.job) | {
            "state": State.QUEUED,
            "accepted_at": self.at,
            "start_deadline": None if timeout_s is None else self.at + timeout_s,
            "not_before": 0.0,  # whatever the clocks of others say
            "fence": 0,
            "attempts": 0,
            "crashes": 0,
            "cancel_requested": False,
        }

    def _receipt_of_the_first(self, connection: Connection, once: Once) -> Receipt | None:
        """Of the submit that came first under the key, or None if there was none. Raises KeyReused.

        A request that was cancelled, or failed for no fault of its own, does not count: its caller tries
        again.
        """
        known = {"tenant": self.job.tenant, "key": once.key, "keys_before": self.at - upkeep.KEY_S}
        row = connection.execute(sql.SUBMITTED, known).mappings().first()
        if row is None or row["error_type"] == Cancelled.error_type or row["retryable"]:
            return None
        if row["once_fingerprint"] != once.fingerprint:
            raise KeyReused("This Idempotency-Key was used for another input; take a new one.")
        position = lookup.position(connection, row) if row["state"] == State.QUEUED else 0
        return Receipt(row["request_id"], position, replayed=True)

    def _remember(self, connection: Connection, once: Once) -> None:
        """This submit is the first under its key."""
        place = {"tenant": self.job.tenant, "key": once.key}
        crash.point("key.unknown")
        connection.execute(sql.FORGET_KEY, place)
        crash.point("key.forgotten")
        new = {"fingerprint": once.fingerprint, "request_id": self.job.request_id, "at": self.at}
        connection.execute(sql.REMEMBER_KEY, place | new)
        crash.point("key.remembered")
