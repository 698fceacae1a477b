"""The JSON documents and headers that fal's clients read."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from deployments.gateway.addresses import application
from schemas.errors import BadRequest, DarkroomError, NotFound, StartTimeout, TooManyRuns
from schemas.jobs import (
    CancelOutcome,
    Event,
    Job,
    JobResult,
    Logged,
    Previewed,
    Priority,
    Receipt,
    Record,
    State,
)

REQUEST_ID = "x-fal-request-id"
REPLAYED = "idempotent-replayed"  # as Stripe calls it
PRIORITY = "x-darkroom-priority"
IGNORED_FIELDS = "x-darkroom-ignored-fields"

STATUS = {
    State.QUEUED: "IN_QUEUE",
    State.RUNNING: "IN_PROGRESS",
    State.COMPLETED: "COMPLETED",
}

_CANCEL: Mapping[CancelOutcome, tuple[int, dict[str, str]]] = {
    CancelOutcome.REQUESTED: (202, {"status": "CANCELLATION_REQUESTED"}),
    CancelOutcome.ALREADY_COMPLETED: (
        400,
        {
            "status": "ALREADY_COMPLETED",
            "detail": "Request is already completed",
            "error_type": BadRequest.error_type,
        },
    ),
    CancelOutcome.NOT_FOUND: (
        404,
        {"status": "NOT_FOUND", "detail": "Request not found", "error_type": NotFound.error_type},
    ),
}


class Json(Response):
    """A JSON answer, escaped to ASCII, so that any text survives."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def failure(error: DarkroomError, headers: Mapping[str, str] | None = None) -> Json:
    """An error in fal's shape."""
    told = {**retry_header(error), **(headers or {})}
    return _answer(error.status, error.body(), error.error_type, error.retryable, told)


def retry_header(error: DarkroomError) -> dict[str, str]:
    """When to try again, if that can be told."""
    return {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}


def result(found: JobResult, request_id: str) -> Json:
    """What a request came to: the bare output, or its error with its own status."""
    headers = {REQUEST_ID: request_id}
    if found.error_type is None:
        return Json(found.body, found.status, headers)
    return _answer(found.status, found.body, found.error_type, found.retryable, headers)


def _answer(
    status: int,
    body: dict[str, Any],
    error_type: str,
    retryable: bool,
    headers: Mapping[str, str] | None,
) -> Json:
    return Json(body, status, {**failure_headers(status, error_type, retryable), **(headers or {})})


def failure_headers(status: int, error_type: str, retryable: bool) -> dict[str, str]:
    """What an error says beside its body."""
    told = {"x-fal-error-type": error_type, "x-fal-retryable": str(retryable).lower()}
    if (status, error_type, retryable) == (StartTimeout.status, StartTimeout.error_type, False):
        told["x-fal-request-timeout-type"] = "user"  # the clients do not try again
    if error_type == TooManyRuns.error_type:
        told["x-fal-needs-retry"] = "1"
    if status == 401:
        told["www-authenticate"] = "Key"
    return told


def cancelled(outcome: CancelOutcome, request_id: str) -> Json:
    status, body = _CANCEL[outcome]
    headers = {REQUEST_ID: request_id}
    if "error_type" not in body:
        return Json(body, status, headers)
    return _answer(status, body | {"message": body["detail"]}, body["error_type"], False, headers)


def receipt(job: Job, given: Receipt, ignored: Sequence[str]) -> Json:
    body: dict[str, Any] = {
        "status": STATUS[State.QUEUED],
        "request_id": job.request_id,
        "gateway_request_id": job.request_id,
        "queue_position": given.position,
        **_urls(job, job.base_url),
        "logs": None,
        "metrics": {},
    }
    headers = {REQUEST_ID: job.request_id, **ignored_header(ignored)}
    if job.priority != Priority.NORMAL:
        headers[PRIORITY] = job.priority.name.lower()
    return Json(body, 200, headers | ({REPLAYED: "true"} if given.replayed else {}))


def ignored_header(ignored: Sequence[str]) -> dict[str, str]:
    """Tells of fields that the endpoint does not know. Names are cut to what a header may hold."""
    names = [name for name in ignored if name.isascii() and name.isprintable() and len(name) <= 64]
    return {IGNORED_FIELDS: ", ".join(names[:20])} if names else {}


def status(record: Record, logs: Sequence[Event] | None, base_url: str) -> dict[str, Any]:
    """The status document. All keys that fal's Python client looks up are there in every state."""
    job = record.job
    body: dict[str, Any] = {
        "status": STATUS[record.state],
        "request_id": job.request_id,
        **_urls(job, base_url),
        "logs": None if logs is None else [line for each in logs if (line := _line(each))],
        "metrics": {},
    }
    if record.position is not None:
        body["queue_position"] = record.position
    if record.result is not None:
        if record.result.inference_s is not None:
            body["metrics"] = {"inference_time": record.result.inference_s}
        if record.result.error is not None:
            body["error"] = record.result.error
            body["error_type"] = record.result.error_type
    return body


def preview(events: Sequence[Event]) -> dict[str, Any]:
    """What a status document says beside, if there is a new preview."""
    outputs = [each.event.output for each in events if isinstance(each.event, Previewed)]
    return {"preview": outputs[-1]} if outputs else {}


def status_code(record: Record) -> int:
    return 200 if record.state == State.COMPLETED else 202


def _urls(job: Job, base_url: str) -> dict[str, str]:
    url = f"{base_url}/queue/{application(job.endpoint_id)}/requests/{job.request_id}"
    return {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}


def _line(event: Event) -> dict[str, Any] | None:
    if not isinstance(event.event, Logged):
        return None
    labels = {"level": event.event.level, "source": "USER"}
    return {
        "message": event.event.message,
        **labels,
        "timestamp": datetime.fromtimestamp(event.at, UTC).isoformat(),
        "labels": labels,  # where fal's Swift and Java clients read them
    }
