"""The changes of a request's state, each a function of a connection within somebody's transaction."""

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from sqlalchemy import Connection, RowMapping

from deployments import crash
from deployments.queue import rows
from deployments.queue import statements as sql
from schemas.errors import Cancelled, Erased, WorkerLost
from schemas.jobs import Claim, Job, JobEvent, JobResult, State
from schemas.settings import LeaseSettings

MAX_DOUBLINGS = 10  # of the backoff


class Setback(Enum):
    """Why a claim ended without a result."""

    UNSTARTED = auto()  # no worker took it
    RETURNED = auto()  # whoever held it gave it back in order
    CRASHED = auto()  # its worker was lost
    LAPSED = auto()  # nobody renewed its lease


def take(connection: Connection, row: RowMapping, owner: str, now: float, lease_until: float) -> Claim:
    """Queued → running."""
    job, fence, attempt = rows.job(row), row["fence"] + 1, row["attempts"] + 1
    change(
        connection,
        row["request_id"],
        state=State.RUNNING,
        started_at=now,
        lease_owner=owner,
        lease_until=lease_until,
        fence=fence,
        attempts=attempt,
    )
    crash.point("take.changed")
    note(connection, row["request_id"], now)
    crash.point("take.noted")
    return Claim(job, fence, attempt, row["start_deadline"], max(0.0, now - row["accepted_at"]))


def put_back(
    connection: Connection,
    row: RowMapping,
    setback: Setback,
    lease: LeaseSettings,
    now: float,
    delay_s: float = 0,
) -> None:
    """Running → queued at its old place, or completed when its caller or the server has had enough of it."""
    is_start = setback in (Setback.CRASHED, Setback.LAPSED)  # one that counts
    crashes = row["crashes"] + (setback is Setback.CRASHED)
    attempts = row["attempts"] - (not is_start)
    if row["cancel_requested"]:
        complete(connection, rows.job(row), JobResult.failure(Cancelled()), now)
    elif is_start and (attempts >= _most_starts(row, lease) or crashes >= lease.max_crashes):
        lost = WorkerLost(f"The request was given up after {attempts} starts and {crashes} lost workers.")
        complete(connection, rows.job(row), JobResult.failure(lost), now)
    else:
        backoff_s = lease.backoff_s * 2 ** min(attempts - 1, MAX_DOUBLINGS) if is_start else delay_s
        change(
            connection,
            row["request_id"],
            state=State.QUEUED,
            crashes=crashes,
            attempts=attempts,
            not_before=now + backoff_s if backoff_s else 0.0,
            lease_owner=None,
            lease_until=None,
        )
        crash.point("put_back.changed")
        note(connection, row["request_id"], now)
        crash.point("put_back.noted")


def _most_starts(row: RowMapping, lease: LeaseSettings) -> int:
    retries = row["max_retries"]
    return lease.max_attempts if retries is None else min(retries + 1, lease.max_attempts)


def complete(connection: Connection, job: Job, result: JobResult, now: float) -> None:
    """Any state but completed → completed, with its webhook owed."""
    change(
        connection,
        job.request_id,
        state=State.COMPLETED,
        finished_at=now,
        lease_owner=None,
        lease_until=None,
        **rows.result_values(result),
    )
    crash.point("complete.changed")
    connection.execute(sql.FORGET_PREVIEWS, {"request_id": job.request_id})
    crash.point("complete.previews_forgotten")
    note(connection, job.request_id, now)
    crash.point("complete.noted")
    if job.webhook_url is not None:
        connection.execute(sql.OWE, rows.owed_values(job.request_id, job.webhook_url, now))
        crash.point("complete.owed")


def erase(connection: Connection, request_id: str) -> None:
    """Delete the input, the output and the log of a completed request; that it was one stays."""
    connection.execute(sql.FORGET_EVENTS, {"request_id": request_id})
    crash.point("erase.log_forgotten")
    change(connection, request_id, input={}, **rows.result_values(JobResult.failure(Erased())))
    crash.point("erase.changed")


def forget(connection: Connection, request_ids: Sequence[str]) -> None:
    """Delete requests and all that hangs on them."""
    for statement in sql.FORGET:
        connection.execute(statement, {"request_ids": request_ids})
        crash.point("forget.deleted")


def held(connection: Connection, claim: Claim) -> RowMapping | None:
    """The row of a claim that still holds, or None."""
    place = {"request_id": claim.job.request_id, "fence": claim.fence}
    return connection.execute(sql.HELD, place).mappings().first()


def change(connection: Connection, request_id: str, **values: Any) -> None:
    connection.execute(sql.SET, {"of": request_id, **values})


def append(connection: Connection, request_id: str, news: Sequence[JobEvent], now: float) -> None:
    """Add to the request's events."""
    if news:
        connection.execute(sql.APPEND, [rows.event_values(request_id, each, now) for each in news])


def note(connection: Connection, request_id: str, now: float) -> None:
    """Have whoever watches the request look again."""
    change = {"request_id": request_id, "kind": rows.STATE_CHANGE, "at": now, "payload": None}
    connection.execute(sql.APPEND, change)
