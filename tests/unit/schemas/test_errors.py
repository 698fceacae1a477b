"""The error tree: shapes, and survival between processes."""

import inspect
import pickle
from typing import Any

import pytest

from schemas import errors
from schemas.errors import (
    AssetError,
    Cancelled,
    DarkroomError,
    FieldError,
    InputError,
    RequestFailed,
    StartTimeout,
    TooManyRequests,
)
from schemas.jobs import JobResult

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, DarkroomError) and kind not in (AssetError, InputError, RequestFailed)
]


def _arguments(kind: type[DarkroomError]) -> tuple[Any, ...]:
    if kind in (Cancelled, StartTimeout):
        return ()
    return ("a message", 5) if issubclass(kind, TooManyRequests) else ("a message",)


SAMPLES: list[DarkroomError] = [
    *(kind(*_arguments(kind)) for kind in KINDS),
    InputError([FieldError(("body", "a", 0), "too big", "less_than", {"lt": 3}, 5)]),
    AssetError("too large", "file_too_large", {"max_size": 5}),
    RequestFailed("broken", 500, "internal_error", {"detail": "broken"}),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_pickles_with_all_it_says(error: DarkroomError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.body() == error.body()
    assert (again.status, again.error_type, str(again)) == (error.status, error.error_type, str(error))
    assert again.retry_after_s == error.retry_after_s


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_every_body_has_what_the_clients_read(error: DarkroomError) -> None:
    body = error.body()
    assert isinstance(body["detail"], str | list)
    if not isinstance(error, RequestFailed):
        assert body["message"]


def test_the_message_names_the_fields() -> None:
    faults = [FieldError(("body", "a"), "Field required", "missing"), FieldError(("body",), "bad", "x")]
    assert InputError(faults).message == "a: Field required; bad"


def test_a_failed_result_raises_what_the_caller_would_have_been_told() -> None:
    result = JobResult.failure(InputError([FieldError(("body", "a"), "bad", "x")]))
    with pytest.raises(RequestFailed) as raised:
        result.output()
    assert raised.value.status == 422
    assert raised.value.body() == result.body
