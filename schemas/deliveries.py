"""The values of webhooks: what is owed to whom, and how every try went. All frozen."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_URL_BYTES = 2048  # of a receiver's: PostgreSQL has it in an index, which takes no more than 2704


class DeliveryState(StrEnum):
    """Where a webhook is. The last two are final, unless the operator has it sent again."""

    DUE = "due"  # waits for its next try
    SENDING = "sending"
    DELIVERED = "delivered"
    FAILED = "failed"  # given up


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook held under a lease to be sent. Its outcome carries `attempt`; a stale one is refused."""

    seq: int
    request_id: str
    tenant: str
    url: str
    host: str
    status: int  # of the result that it tells of
    body: dict[str, Any]  # of that result
    attempt: int  # 1 for the first, counted on when it is sent again
    retries: int  # of the schedule that have been used
    traceparent: str | None = None  # of its request, see Job


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a try went: the receiver's HTTP status, or why there is none."""

    status: int | None
    error: str | None
    duration_s: float


@dataclass(frozen=True, slots=True)
class Try:
    """A try in the log. One without an outcome is under way, or its sender died."""

    attempt: int
    began_at: float  # seconds since the epoch
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A webhook as the operator sees it. Times are seconds since the epoch."""

    request_id: str
    url: str
    state: DeliveryState
    created_at: float
    attempts: int
    next_attempt_at: float | None  # while it is due
    ended_at: float | None
    last_status: int | None
    last_error: str | None
