"""How long a caller wants files to be kept: the headers of fal's object lifecycle."""

from typing import Literal

from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import Headers

from schemas.errors import BadRequest

UPLOADED = "x-fal-object-lifecycle"
PREFERRED = "x-fal-object-lifecycle-preference"  # for the files of an output

MAX_KEEP_S = 10**10


class _Acl(BaseModel):
    """Only `allow`: a file is open to whoever has its URL."""

    class Rule(BaseModel):
        decision: Literal["allow"]

    default: Literal["allow"] | None = None
    rules: list[Rule] = []


class _Lifecycle(BaseModel):
    expiration_duration_seconds: int | None = Field(None, gt=0, le=MAX_KEEP_S)
    initial_acl: _Acl | None = None


def keep_s(headers: Headers, *names: str) -> int | None:
    """What the first of these headers that is there asks for, in seconds; None: for good.

    Raises BadRequest for what is malformed, and for files that some may not read.
    """
    for name in names:
        if (text := headers.get(name)) is None:
            continue
        try:
            return _Lifecycle.model_validate_json(text).expiration_duration_seconds
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join([name, *map(str, first["loc"])])
            raise BadRequest(f"{place}: {first['msg']}") from None
    return None
