"""What the file store wants of a place for its objects. See `folder` and `bucket`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from obstore.store import LocalStore, S3Store


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where a client reads a file without us, and for how many seconds it may."""

    url: str
    lasts_s: int


class Place(Protocol):
    """Names are those of objects, with slashes for folders."""

    @property
    def objects(self) -> LocalStore | S3Store: ...

    @property
    def block_bytes(self) -> int:
        """What is written at once."""
        ...

    def url(self, name: str) -> str:
        """What names the object to whoever may read the place itself."""
        ...

    def secret(self) -> bytes:
        """Random bytes, for ever the same: whoever comes first draws them."""
        ...

    def free_bytes(self) -> int | None:
        """The room that is left, where that has an end that can be asked for."""
        ...

    def attributes(self, told: Mapping[str, str]) -> dict[str, str] | None:
        """The headers that are to be kept with an object, if the place keeps any."""
        ...

    async def redirect(self, name: str, left_s: float | None) -> Redirect | None:
        """Where a client may read an object that is there, unless the server hands it out itself."""
        ...

    async def clear(self, folder: str) -> None:
        """Remove all that is in a folder."""
        ...

    async def clear_left(self, folder: str, end: float) -> None:
        """Remove the folders below `folder`, and what a killed process was writing anywhere, if they have
        not changed since `end`, unix seconds."""
        ...
