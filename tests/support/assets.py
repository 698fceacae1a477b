"""The files that a request names, without fetching them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from PIL.Image import Image as Picture

from pipelines.base import Assets
from schemas.assets import assets
from schemas.errors import Location
from schemas.fields import EndpointInput

FileT = TypeVar("FileT")


def given(request: EndpointInput, files: Mapping[str, Picture | Path | bytes]) -> Assets:
    """What the worker would hand to `prepare` if each source led to its file in `files`.

    Raises KeyError with the source of a file that the request names and `files` lacks.
    """
    named = [(ref.loc, files[ref.asset.source]) for ref in assets(request)]

    def of(kind: type[FileT]) -> Iterator[tuple[Location, FileT]]:
        return ((loc, file) for loc, file in named if isinstance(file, kind))

    return Assets(dict(of(Picture)), dict(of(Path)), dict(of(bytes)))
