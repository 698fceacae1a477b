"""The values that walk through the server: a job, its events, its result. All frozen, all picklable."""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Literal

from schemas.errors import DarkroomError, RequestFailed


class State(StrEnum):
    """Where a job is. Completed is final, whatever the outcome."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"


class Priority(IntEnum):
    """The smaller number runs first."""

    NORMAL = 0
    LOW = 1


@dataclass(frozen=True, slots=True)
class Backlog:
    """What there is to do for a model beside a request, when that is handed over."""

    waiting: int = 0  # requests that are not handed over yet
    low: int = 0  # of these and of those handed over, the ones of low priority


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted request: what is asked, of which model, and how the caller wants to hear of it."""

    request_id: str
    endpoint_id: str
    model: str  # the Serve application that runs it
    input: dict[str, Any]  # JSON, valid for the endpoint's Input
    tenant: str = "public"  # the key's id
    priority: Priority = Priority.NORMAL
    base_url: str = ""  # how the caller reaches the server; file URLs begin with it
    start_timeout_s: float | None = None  # must start within, counted from acceptance
    webhook_url: str | None = None
    previews: bool = False  # the caller watches pictures form
    max_retries: int | None = None  # after the loss of its worker; None: as often as the server will
    stores_io: bool = True  # whether its input and output stay after the result was due to be fetched
    tags: tuple[str, ...] = ()  # the caller's own words for it
    keep_s: int | None = None  # how long the output's files are kept; None: for good
    traceparent: str | None = None  # the span that it goes on with, in W3C's form
    waited_s: float = 0.0  # from its acceptance until it was handed to a worker; the queue keeps it nowhere


LogLevel = Literal["DEBUG", "INFO", "WARN", "ERROR"]


@dataclass(frozen=True, slots=True)
class Logged:
    """A line for the caller's log."""

    message: str
    level: LogLevel = "INFO"


@dataclass(frozen=True, slots=True)
class Previewed:
    """A picture on its way: the endpoint's Output as it would be now, with a small data URI."""

    output: dict[str, Any]


JobEvent = Logged | Previewed


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended: the HTTP answer that its caller gets, for ever the same."""

    status: int
    body: dict[str, Any]
    error: str | None = None
    error_type: str | None = None
    retryable: bool = False
    inference_s: float | None = None

    @classmethod
    def success(cls, output: dict[str, Any], inference_s: float) -> "JobResult":
        return cls(200, output, inference_s=inference_s)

    @classmethod
    def failure(cls, error: DarkroomError) -> "JobResult":
        return cls(
            error.status,
            error.body(),
            error=error.message,
            error_type=error.error_type,
            retryable=error.retryable,
        )

    def output(self) -> dict[str, Any]:
        """The output of a success. Raises RequestFailed with what the caller would have been told."""
        if self.status == 200:
            return self.body
        raise RequestFailed(self.error or "", self.status, self.error_type or "", self.body, self.retryable)


WORD_S = 1.0  # a worker speaks so often also where there is nothing to say


@dataclass(frozen=True, slots=True)
class Update:
    """What a worker says since it last spoke: events, and with the last update the result."""

    events: tuple[JobEvent, ...] = ()
    result: JobResult | None = None
    has_begun: bool = True  # false while the job waits in the worker


@dataclass(frozen=True, slots=True)
class Once:
    """A caller's word that a submit under the same key is the same submit, and what was asked under it."""

    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to a submit."""

    request_id: str
    position: int  # jobs of the same model that run before it
    replayed: bool = False  # it is that of an earlier submit under the same key


@dataclass(frozen=True, slots=True)
class Claim:
    """A job held under a lease. Writes carry the fence; a stale one is refused."""

    job: Job
    fence: int
    attempt: int  # 1 for the first
    start_deadline: float | None = None  # a worker must have begun by then, seconds since the epoch
    waited_s: float = 0.0  # since the job was accepted


@dataclass(frozen=True, slots=True)
class Event:
    """A job event as it was stored; `seq` grows over the whole server."""

    seq: int
    request_id: str
    at: float  # seconds since the epoch
    event: JobEvent


@dataclass(frozen=True, slots=True)
class Record:
    """A job as the queue knows it now."""

    job: Job
    state: State
    accepted_at: float
    position: int | None = None  # while queued
    started_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0
    cancel_requested: bool = False
    result: JobResult | None = None


class CancelOutcome(StrEnum):
    """What a cancel request met."""

    REQUESTED = "requested"
    ALREADY_COMPLETED = "already_completed"
    NOT_FOUND = "not_found"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a watcher sees: the record now, and the events since it last looked."""

    record: Record
    events: tuple[Event, ...] = field(default=())
