"""The one error tree. A class says who is at fault, which HTTP status that is, and whether to try again.

    DarkroomError
    ├── RequestFailed           how another process's request ended, status and all
    ├── RequestError            the caller's: 4xx
    │   ├── InputError          422, a list of fields and what to change
    │   ├── AssetError          422, before the field that named the file is known
    │   ├── BadRequest          400
    │   ├── KeyReused           422
    │   ├── Erased              410
    │   ├── NotAuthenticated    401
    │   ├── Forbidden           403
    │   ├── NotFound            404
    │   │   └── RequestNotFound 404, with the status word that fal's queue uses
    │   ├── MethodNotAllowed    405
    │   ├── TargetRefused       412
    │   ├── TooSlow             408
    │   ├── BodyTooLarge        413
    │   ├── QueueFull           429
    │   ├── TooManyRuns         429
    │   ├── TooManyRequests     429, more in a minute than the caller may
    │   │   └── QuotaSpent      429, more in a day
    │   └── Cancelled           499
    └── ServerError             ours: 5xx
        ├── StoreDown           503, the queue's database or the file store cannot be reached or written
        │   └── StoreFull       507, the disk has no room; nothing was kept
        ├── BrokenOff           500, an answer that has begun cannot be finished
        ├── InternalError       500, the model failed on a valid request
        │   ├── OutOfMemory     500, there is not the memory on the device
        │   └── NotFinite       500, the model's numbers make no picture
        ├── WorkerLost          503, the process that ran it died
        ├── NotReady            503, nothing can serve it at this moment
        ├── NoRoom              503, a model does not fit into its share of the GPU and does not start
        ├── StartTimeout        504, the caller's own start deadline passed
        └── RunTimeout          504, it ran for longer than the operator allows

Shapes follow fal.ai: model errors carry a list `detail`, infrastructure errors a string `detail` and
an `error_type`. Both carry a top-level `message`, because fal's JavaScript client shows only that.
Every class is constructed from positional values, so that it survives pickling between processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Location = tuple[str | int, ...]


class DarkroomError(Exception):
    """The base: `message` tells the caller what to change or what to expect."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    retry_after_s: int | None = None  # when to try again, where that can be told

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def body(self) -> dict[str, Any]:
        """The JSON body of the HTTP answer."""
        return {"detail": self.message, "error_type": self.error_type, "message": self.message}


class RequestError(DarkroomError):
    """The request cannot be served as it is; sending it again changes nothing."""

    status = 400
    error_type = "bad_request"


@dataclass(frozen=True, slots=True)
class FieldError:
    """One field that is wrong: where (`("body", "prompt")`), what to change, and pydantic's or fal's type."""

    loc: Location
    msg: str
    type: str
    ctx: dict[str, Any] = field(default_factory=dict)
    input: Any = None

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"loc": list(self.loc), "msg": self.msg, "type": self.type}
        if self.ctx:
            body["ctx"] = self.ctx
        if self.input is not None:
            body["input"] = self.input
        return body

    def sentence(self) -> str:
        path = ".".join(str(part) for part in self.loc[1:])
        return f"{path}: {self.msg}" if path else self.msg


class InputError(RequestError):
    """Some fields are wrong; `fields` names each of them."""

    status = 422
    error_type = "validation_error"

    def __init__(self, fields: Sequence[FieldError]) -> None:
        self.fields = tuple(fields)
        super().__init__("; ".join(each.sentence() for each in self.fields))

    def __reduce__(self) -> tuple[type["InputError"], tuple[Any, ...]]:
        return type(self), (self.fields,)

    def body(self) -> dict[str, Any]:
        detail = [each.body() for each in self.fields]
        return {"detail": detail, "error_type": self.error_type, "message": self.message}


class AssetError(RequestError):
    """A file that a request names cannot be used. Whoever knows the field turns it into InputError."""

    status = 422

    def __init__(self, message: str, kind: str, ctx: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.args = (message, kind, ctx)
        self.kind = kind  # fal's word: file_download_error, image_load_error, file_too_large …
        self.ctx = ctx or {}

    def at(self, loc: Location) -> InputError:
        """The same error with the field that named the file."""
        return InputError([FieldError(loc, self.message, self.kind, self.ctx)])


class BadRequest(RequestError):
    """The request itself is malformed."""


class KeyReused(RequestError):
    """An Idempotency-Key came again with another input."""

    status = 422
    error_type = "idempotency_key_reused"


class Erased(RequestError):
    """The caller had the request's payloads deleted."""

    status = 410
    error_type = "payloads_deleted"

    def __init__(self, message: str = "The payloads of this request were deleted.") -> None:
        super().__init__(message)


class NotAuthenticated(RequestError):
    """No key, or a wrong one."""

    status = 401
    error_type = "auth_error"


class Forbidden(RequestError):
    """What the caller shows does not allow this."""

    status = 403
    error_type = "auth_error"


class NotFound(RequestError):
    """No such application, path, request or file."""

    status = 404
    error_type = "not_found"


class RequestNotFound(NotFound):
    """No such request, or one of another tenant."""

    def body(self) -> dict[str, Any]:
        return {"status": "NOT_FOUND", **super().body()}


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    status = 405
    error_type = "method_not_allowed"


class TargetRefused(RequestError):
    """The proxy was asked for a host that it does not stand for."""

    status = 412


class TooSlow(RequestError):
    """The body did not come in the time that the server waits."""

    status = 408
    error_type = "request_timeout"


class BodyTooLarge(RequestError):
    """The body exceeds the server's limit."""

    status = 413
    error_type = "request_too_large"


class QueueFull(RequestError):
    """More requests wait than the caller accepts."""

    status = 429
    error_type = "queue_full"
    retryable = True
    retry_after_s = 1


class TooManyRuns(RequestError):
    """The caller waits for as many runs as it may; the queue takes what comes beyond."""

    status = 429
    error_type = "concurrent_requests_limit"
    retryable = True
    retry_after_s = 1


class TooManyRequests(RequestError):
    """The caller sent more in a minute than it may: requests, or keys that are none."""

    status = 429
    error_type = "rate_limit_exceeded"
    retryable = True

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.args = (message, retry_after_s)
        self.retry_after_s = retry_after_s


class QuotaSpent(TooManyRequests):
    """The caller sent more in a day than it may. Trying again helps tomorrow."""

    error_type = "quota_exceeded"
    retryable = False


class Cancelled(RequestError):
    """The caller cancelled the request."""

    status = 499
    error_type = "client_cancelled"

    def __init__(self, message: str = "Request cancelled by the client.") -> None:
        super().__init__(message)


class RequestFailed(DarkroomError):
    """A finished request did not succeed; `status`, `error_type` and the body are its answer's."""

    def __init__(
        self, message: str, status: int, error_type: str, answer: dict[str, Any], retryable: bool = False
    ) -> None:
        super().__init__(message)
        self.args = (message, status, error_type, answer, retryable)
        self.status = status  # type: ignore[misc]
        self.error_type = error_type  # type: ignore[misc]
        self.retryable = retryable  # type: ignore[misc]
        self._answer = answer

    def body(self) -> dict[str, Any]:
        return self._answer


class ServerError(DarkroomError):
    """The request was fine; the server failed."""


class InternalError(ServerError):
    """The model failed on a valid request. The cause is in the server's log under the request id."""

    error_type = "internal_server_error"

    def body(self) -> dict[str, Any]:
        detail = FieldError(("body",), self.message, self.error_type)
        return {"detail": [detail.body()], "error_type": self.error_type, "message": self.message}


class OutOfMemory(InternalError):
    """The device has not the memory for the request alone."""

    error_type = "out_of_memory"

    def __init__(
        self,
        message: str = "The device has not enough memory for the request; "
        "ask for a smaller size, fewer images or fewer adapters.",
    ) -> None:
        super().__init__(message)


class NotFinite(InternalError):
    """The model's numbers overflowed on the way, so that there is no picture."""

    error_type = "not_finite"

    def __init__(
        self,
        message: str = "The model's numbers overflowed and make no picture; "
        "try another seed, size, guidance scale or other adapters.",
    ) -> None:
        super().__init__(message)


class BrokenOff(ServerError):
    """An answer that has begun cannot be finished: the connection ends in the middle of it."""


class StoreDown(ServerError):
    """The queue's database or the file store fails at this moment; nothing was accepted."""

    status = 503
    retryable = True


class StoreClosed(StoreDown):
    """This process has closed the queue: it is of no use to try again here."""


class StoreFull(StoreDown):
    """The disk has no room for what was sent; nothing of it was kept."""

    status = 507
    error_type = "insufficient_storage"

    def __init__(self, message: str = "The server has no room for more files at this moment.") -> None:
        super().__init__(message)


class WorkerLost(ServerError):
    """The process that ran the request died or could not be reached."""

    status = 503
    error_type = "runner_disconnected"
    retryable = True


class NotReady(ServerError):
    """Nothing can serve the request at this moment."""

    status = 503
    error_type = "runner_scheduling_failure"
    retryable = True


class NoRoom(ServerError):
    """A model does not fit into its share of the device: it refuses to start."""

    status = 503
    error_type = "runner_scheduling_failure"


class RunTimeout(ServerError):
    """The request ran for longer than its model's `run_limit_s`.

    Unlike one that missed its start, it may be sent again.
    """

    status = 504
    error_type = "request_timeout"
    retryable = True


class StartTimeout(ServerError):
    """The request did not start within the time its caller set."""

    status = 504
    error_type = "request_timeout"

    def __init__(self, message: str = "Request timed out") -> None:
        super().__init__(message)
