"""A JSON object → an endpoint's Input, or fal's list of what is wrong with it."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from schemas.errors import FieldError, InputError, Location
from schemas.fields import EndpointInput
from schemas.settings import Limits

InputT = TypeVar("InputT", bound=EndpointInput)
ModelT = TypeVar("ModelT", bound=BaseModel)

MAX_ECHO = 200  # characters of a wrong value that are sent back


def validate(kind: type[InputT], data: Mapping[str, Any], limits: Limits) -> InputT:
    """Raises InputError that names each wrong field by its path, and what to change."""
    value = read(kind, data)
    value.check(limits)
    return value


def read(kind: type[ModelT], data: Mapping[str, Any]) -> ModelT:
    """What the schema alone can tell. Raises InputError."""
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        raise InputError([_field(each, data) for each in error.errors()]) from None


def ignored(kind: type[EndpointInput], data: Mapping[str, Any]) -> list[str]:
    """The fields sent that the endpoint does not know."""
    return sorted(set(data) - set(kind.model_fields))


def _field(error: ErrorDetails, data: Mapping[str, Any]) -> FieldError:
    ctx = {name: value for name, value in error.get("ctx", {}).items() if _is_plain(value)}
    given = error["input"]
    return FieldError(
        _path(error["loc"], data, is_missing=error["type"] == "missing"),
        error["msg"],
        error["type"],
        ctx,
        given if _is_plain(given) and len(str(given)) <= MAX_ECHO else None,
    )


def _path(loc: Location, data: Any, *, is_missing: bool) -> Location:
    """The place in the caller's own data. pydantic's names of union members are left out of it."""
    path: list[str | int] = ["body"]
    for index, part in enumerate(loc):
        inside = _inside(data, part)
        if inside is not None or (is_missing and index == len(loc) - 1):
            path.append(part)
            data = inside
    return tuple(path)


def _inside(data: Any, part: str | int) -> Any:
    if isinstance(data, Mapping):
        return data.get(part)
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return data[part]
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int | bool)
