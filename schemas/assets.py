"""The files that a request names: which fields hold them, and what they are once fetched."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from schemas.errors import Location


class AssetKind(Enum):
    """Put into a field's annotation: `Annotated[str, AssetKind.IMAGE]`."""

    IMAGE = "image"
    LORA = "lora"
    CONTROLNET = "controlnet"
    EASYCONTROL = "easycontrol"
    CONFIG = "config"  # JSON

    @property
    def is_weights(self) -> bool:
        """Whether it is a file for the model, worth fetching ahead and keeping on disk."""
        return self in (AssetKind.LORA, AssetKind.CONTROLNET, AssetKind.EASYCONTROL)


@dataclass(frozen=True, slots=True)
class Asset:
    """What a caller calls a file. Equal ones are fetched once."""

    kind: AssetKind
    source: str  # a URL, a data URI, a Hub id, a name
    variant: str | None = None  # which of a Hub repository's files, where it has several


@dataclass(frozen=True, slots=True)
class AssetRef:
    """A file, and the field that names it: ("body", "loras", 0, "path")."""

    loc: Location
    asset: Asset


def assets(value: BaseModel, loc: Location = ("body",)) -> Iterator[AssetRef]:
    """Every file that a request names, in the order of its fields.

    The field `variant` of an object says which file of a repository its weights are.
    """
    for name, info in type(value).model_fields.items():
        kind = _kind(info)
        variant = getattr(value, "variant", None) if kind is AssetKind.CONTROLNET else None
        yield from _inside(getattr(value, name), (*loc, name), kind, variant)


def weights(request: BaseModel) -> list[Asset]:
    """The weights files that a request names, each once."""
    return list(dict.fromkeys(ref.asset for ref in assets(request) if ref.asset.kind.is_weights))


def takes_weights(kind: type[BaseModel]) -> bool:
    """Whether requests of this type have a field for a weights file."""
    for info in kind.model_fields.values():
        mark = _kind(info)
        if mark is not None and mark.is_weights:
            return True
        if any(takes_weights(part) for part in _objects(info.annotation)):
            return True
    return False


def needs_image(kind: type[BaseModel]) -> bool:
    """Whether requests of this type must name a picture."""
    return any(info.is_required() and _kind(info) is AssetKind.IMAGE for info in kind.model_fields.values())


def _objects(annotation: Any) -> Iterator[type[BaseModel]]:
    """The types of the objects that a field may hold: `list[LoraWeight] | None` → LoraWeight."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _objects(part)


def _kind(info: FieldInfo) -> AssetKind | None:
    """The mark of a field, which pydantic leaves inside of an optional one: `ImageUrl | None`."""
    options = [info.metadata, *(getattr(each, "__metadata__", ()) for each in get_args(info.annotation))]
    return next((mark for marks in options for mark in marks if isinstance(mark, AssetKind)), None)


def _inside(value: Any, loc: Location, kind: AssetKind | None, variant: str | None) -> Iterator[AssetRef]:
    if isinstance(value, BaseModel):
        yield from assets(value, loc)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _inside(each, (*loc, index), kind, variant)
    elif isinstance(value, Mapping):
        return
    elif kind is not None and isinstance(value, str):
        yield AssetRef(loc, Asset(kind, value, variant))
