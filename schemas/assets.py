"""The files that a request names: which fields hold them, and what they are once fetched."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel

from schemas.errors import Location


class AssetKind(Enum):
    """Put into a field's annotation: `Annotated[str, AssetKind.IMAGE]`."""

    IMAGE = "image"
    WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class AssetRef:
    """One file that a request names."""

    loc: Location  # ("body", "loras", 0, "path")
    kind: AssetKind
    source: str  # what the caller wrote: a URL, a data URI, a Hub id, a name


def assets(value: BaseModel, loc: Location = ("body",)) -> Iterator[AssetRef]:
    """Every file that a request names, in the order of its fields."""
    for name, info in type(value).model_fields.items():
        kind = next((each for each in info.metadata if isinstance(each, AssetKind)), None)
        yield from _inside(getattr(value, name), (*loc, name), kind)


def _inside(value: Any, loc: Location, kind: AssetKind | None) -> Iterator[AssetRef]:
    if isinstance(value, BaseModel):
        yield from assets(value, loc)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _inside(each, (*loc, index), kind)
    elif isinstance(value, Mapping):
        return
    elif kind is not None and isinstance(value, str):
        yield AssetRef(loc, kind, value)
