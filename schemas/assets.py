"""The files that a request names: which fields hold them, and what they are once fetched."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_args

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from schemas.errors import Location

KEYWORD = "x-darkroom-asset"  # in a field's JSON schema: what its text names, so that forms can take a file


class AssetKind(Enum):
    """What a file is for."""

    IMAGE = "image"
    CONFIG = "config"  # JSON
    LORA = "lora"
    CONTROLNET = "controlnet"
    EASYCONTROL = "easycontrol"
    BASE = "base"  # a model that requests name: a file or a folder
    UNET = "unet"  # in place of the base's: a file or a folder
    EMBEDDING = "embedding"
    IP_ADAPTER = "ip_adapter"
    IMAGE_ENCODER = "image_encoder"  # a file, or a folder that has its config
    IC_LIGHT = "ic_light"
    FACE_ANALYSIS = "face_analysis"  # a folder of the operator's; never fetched

    @property
    def is_weights(self) -> bool:
        """Whether it is something for the model, worth fetching ahead and keeping on disk."""
        return self not in (AssetKind.IMAGE, AssetKind.CONFIG, AssetKind.FACE_ANALYSIS)


@dataclass(frozen=True, slots=True)
class Names:
    """Put into a field's annotation: its text names a file. `Annotated[str, Names(AssetKind.IMAGE)]`

    The others are the fields beside it that say which of a Hub repository's files it is.
    """

    kind: AssetKind
    variant: str | None = None
    folder: str | None = None
    file: str | None = None

    def asset(self, source: str, beside: BaseModel) -> "Asset":
        """The file that `source` names in the object `beside`."""
        more = (getattr(beside, name) if name else None for name in (self.variant, self.folder, self.file))
        return Asset(self.kind, source, *more)

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        return schema if self.kind is AssetKind.FACE_ANALYSIS else {**schema, KEYWORD: self.kind.value}


@dataclass(frozen=True, slots=True)
class Asset:
    """What a caller calls a file. Equal ones are fetched once."""

    kind: AssetKind
    source: str  # a URL, a data URI, a Hub id, a name
    variant: str | None = None  # which of a Hub repository's files, where it has several
    folder: str | None = None  # where in the repository
    file: str | None = None  # the file's name there

    @property
    def digest(self) -> str:
        """A short name for it between processes."""
        words = [self.kind.value, self.source, self.variant, self.folder, self.file]
        return hashlib.sha256(repr(words).encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class AssetRef:
    """A file, and the field that names it: ("body", "loras", 0, "path")."""

    loc: Location
    asset: Asset


def assets(value: BaseModel, loc: Location = ("body",)) -> Iterator[AssetRef]:
    """Every file that a request names, in the order of its fields."""
    for name, info in type(value).model_fields.items():
        yield from _inside(getattr(value, name), (*loc, name), _mark(info), value)


def weights(request: BaseModel) -> list[Asset]:
    """The weights files that a request names, each once."""
    return list(dict.fromkeys(ref.asset for ref in assets(request) if ref.asset.kind.is_weights))


def takes_weights(kind: type[BaseModel]) -> bool:
    """Whether requests of this type have a field for a weights file."""
    for info in kind.model_fields.values():
        mark = _mark(info)
        if mark is not None and mark.kind.is_weights:
            return True
        if any(takes_weights(part) for part in _objects(info.annotation)):
            return True
    return False


def takes_image(kind: type[BaseModel]) -> bool:
    """Whether requests of this type have a field of their own for a picture."""
    marks = [_mark(info) for info in kind.model_fields.values()]
    return any(mark is not None and mark.kind is AssetKind.IMAGE for mark in marks)


def _objects(annotation: Any) -> Iterator[type[BaseModel]]:
    """The types of the objects that a field may hold: `list[LoraWeight] | None` → LoraWeight."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _objects(part)


def _mark(info: FieldInfo) -> Names | None:
    """The mark of a field, which pydantic leaves inside of an optional one: `ImageUrl | None`."""
    options = [info.metadata, *(getattr(each, "__metadata__", ()) for each in get_args(info.annotation))]
    return next((mark for marks in options for mark in marks if isinstance(mark, Names)), None)


def _inside(value: Any, loc: Location, mark: Names | None, beside: BaseModel) -> Iterator[AssetRef]:
    if isinstance(value, BaseModel):
        yield from assets(value, loc)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _inside(each, (*loc, index), mark, beside)
    elif mark is not None and isinstance(value, str):
        yield AssetRef(loc, mark.asset(value, beside))
