"""Bytes from outside → JSON that is safe to pass on.

The standard parser lets NaN, 1e999 and lone surrogates in, and fails in three different ways on deep,
long or badly encoded input. Here each of them becomes an InputError with the place of the fault.
"""

import json
import math
from collections.abc import AsyncIterable, Iterator
from typing import Any

from schemas.errors import BodyTooLarge, FieldError, InputError, Location

MAX_DEPTH = 32
MAX_DIGITS = 100  # of an integer; no field takes more than 20
MAX_FAULTS = 20  # told at once
MAX_LENGTH = 4096  # of a list or an object; no field takes more than 2000
MAX_VALUES = 250_000  # in a whole body
MAX_COMMAS = 2_000_000  # in a whole body, before it is parsed


class _TooLong:
    """Stands where an integer with too many digits stood."""

    def __init__(self, digits: int) -> None:
        self.digits = digits


async def read(chunks: AsyncIterable[bytes], declared: str | None, limit: int) -> bytes:
    """The whole body. Raises BodyTooLarge before more than `limit` bytes are kept."""
    refusal = BodyTooLarge(f"The body must be at most {limit} bytes; send files by URL instead.")
    if (length(declared) or 0) > limit:
        raise refusal
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise refusal
    return bytes(body)


def length(declared: str | None) -> int | None:
    """What a Content-Length header says, if it says anything."""
    is_number = declared is not None and declared.isascii() and declared.isdigit()
    return int(declared[:20]) if declared and is_number else None


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object; an empty body is an empty one. Raises InputError."""
    if not body.strip():
        return {}
    value = _load(body)
    check(value)
    if not isinstance(value, dict):
        raise InputError([FieldError(("body",), "The body must be a JSON object", "dict_type")])
    return value


def check(value: Any) -> None:
    """Raise InputError for what no field may hold, wherever it stands in a JSON value."""
    if faults := list(_faults(value)):
        raise InputError(faults[:MAX_FAULTS])


def _load(body: bytes) -> Any:
    if body.count(b",") > MAX_COMMAS:
        raise InputError([_too_many()])
    try:
        return json.loads(body.decode("utf-8"), parse_int=_integer)
    except UnicodeDecodeError as error:
        reason = f"The body is not UTF-8: {error.reason} at byte {error.start}"
    except json.JSONDecodeError as error:
        reason = f"The body is not JSON: {error.msg} at character {error.pos}"
    except RecursionError:
        reason = f"The body is nested deeper than {MAX_DEPTH} levels"
    raise InputError([FieldError(("body",), reason, "json_invalid")])


def _integer(digits: str) -> int | _TooLong:
    return int(digits) if len(digits) <= MAX_DIGITS else _TooLong(len(digits))


def _faults(root: Any) -> Iterator[FieldError]:
    """What no field may hold, with its place. Walks without recursion."""
    todo: list[tuple[Location, Any]] = [(("body",), root)]
    room = MAX_VALUES
    while todo:
        loc, value = todo.pop()
        room -= 1
        if not room:
            yield _too_many()
            return
        if fault := _fault(loc, value):
            yield fault
        elif isinstance(value, dict):
            todo += [((*loc, key), key) for key in value if _fault(loc, key)]
            todo += [((*loc, key), each) for key, each in value.items()]
        elif isinstance(value, list):
            todo += [((*loc, index), each) for index, each in enumerate(value)]


def _fault(loc: Location, value: Any) -> FieldError | None:
    match value:
        case _TooLong(digits=digits):
            return FieldError(loc, f"An integer of {digits} digits is too long", "int_parsing_size")
        case float() if not math.isfinite(value):
            return FieldError(loc, "The number must be finite", "finite_number")
        case str() if "\0" in value or not _encodes(value):
            return FieldError(loc, "The text must be valid Unicode without NUL", "string_unicode")
        case dict() | list() if len(value) > MAX_LENGTH:
            message = f"At most {MAX_LENGTH} values are taken in one place, not {len(value)}"
            return FieldError(loc, message, "too_long", {"max_length": MAX_LENGTH})
        case dict() | list() if len(loc) > MAX_DEPTH:
            return FieldError(loc[:4], f"The value is nested deeper than {MAX_DEPTH} levels", "json_invalid")
    return None


def _too_many() -> FieldError:
    return FieldError(("body",), f"At most {MAX_VALUES} values are taken in a request", "too_long")


def _encodes(text: str) -> bool:
    """Whether the text is free of lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
