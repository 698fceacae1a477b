"""Rows of the tables ↔ the values that walk."""

from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import RowMapping

from schemas.deliveries import Delivery, DeliveryRecord, DeliveryState, Outcome, Try
from schemas.jobs import Event, Job, JobEvent, JobResult, Logged, Previewed, Priority, Record, State

STATE_CHANGE = "state"  # the kind of an event row that only says: look again

_KINDS: dict[str, type[JobEvent]] = {"log": Logged, "preview": Previewed}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def job_values(job: Job) -> dict[str, Any]:
    """The columns that a job fills."""
    values = {**asdict(job), "priority": int(job.priority)}
    del values["waited_s"]  # which follows from `accepted_at`
    return values


def job(row: RowMapping) -> Job:
    return Job(
        request_id=row["request_id"],
        endpoint_id=row["endpoint_id"],
        model=row["model"],
        input=row["input"],
        tenant=row["tenant"],
        priority=Priority(row["priority"]),
        base_url=row["base_url"],
        start_timeout_s=row["start_timeout_s"],
        webhook_url=row["webhook_url"],
        previews=row["previews"],
        max_retries=row["max_retries"],
        stores_io=row["stores_io"],
        tags=tuple(row["tags"] or ()),
        keep_s=row["keep_s"],
        traceparent=row["traceparent"],
    )


def result_values(result: JobResult) -> dict[str, Any]:
    """The columns that a result fills."""
    return asdict(result) | {"error": _text(result.error)}


def _text(text: str | None) -> str | None:
    """As every store takes it: PostgreSQL has no NUL."""
    return None if text is None else text.replace("\0", "\ufffd")


def _result(row: RowMapping) -> JobResult | None:
    if row["state"] != State.COMPLETED:
        return None
    return JobResult(
        status=row["status"],
        body=row["body"],
        error=row["error"],
        error_type=row["error_type"],
        retryable=row["retryable"],
        inference_s=row["inference_s"],
    )


def record(row: RowMapping, position: int | None) -> Record:
    return Record(
        job=job(row),
        state=State(row["state"]),
        accepted_at=row["accepted_at"],
        position=position,
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        attempts=row["attempts"],
        cancel_requested=row["cancel_requested"],
        result=_result(row),
    )


def owed_values(request_id: str, url: str, now: float) -> dict[str, Any]:
    """The columns of a webhook that is owed from now on."""
    return {
        "request_id": request_id,
        "url": url,
        "host": _host(url),
        "state": DeliveryState.DUE,
        "created_at": now,
        "attempts": 0,
        "retries": 0,
        "next_attempt_at": now,
    }


def _host(url: str) -> str:
    """What the webhooks to one host have in common. Never raises: a request must be able to end."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")[:255]
    except ValueError:
        return ""


def delivery(row: RowMapping, attempt: int) -> Delivery:
    return Delivery(
        seq=row["seq"],
        request_id=row["request_id"],
        tenant=row["tenant"],
        url=row["url"],
        host=row["host"],
        status=row["status"],
        body=row["body"],
        attempt=attempt,
        retries=row["retries"],
        traceparent=row["traceparent"],
    )


def delivery_record(row: RowMapping) -> DeliveryRecord:
    is_due = row["state"] == DeliveryState.DUE
    return DeliveryRecord(
        request_id=row["request_id"],
        url=row["url"],
        state=DeliveryState(row["state"]),
        created_at=row["created_at"],
        attempts=row["attempts"],
        next_attempt_at=row["next_attempt_at"] if is_due else None,
        ended_at=row["ended_at"],
        last_status=row["last_status"],
        last_error=row["last_error"],
    )


def webhook_try(row: RowMapping) -> Try:
    if row["duration_s"] is None:
        return Try(row["attempt"], row["began_at"], None)
    outcome = Outcome(row["status"], row["error"], row["duration_s"])
    return Try(row["attempt"], row["began_at"], outcome)


def event_values(request_id: str, event: JobEvent, at: float) -> dict[str, Any]:
    """The columns of an event row."""
    kind = _NAMES[type(event)]
    return {"request_id": request_id, "kind": kind, "at": at, "payload": asdict(event)}


def event(row: RowMapping) -> Event:
    kind = _KINDS[row["kind"]]
    return Event(row["seq"], row["request_id"], row["at"], kind(**row["payload"]))
