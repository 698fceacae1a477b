"""What a request may call weights, and how each kind of source is read."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from deployments.files.fetch import CHUNK_BYTES, Downloaded, Fetcher, drain, own_key
from deployments.files.fetch import Report as Progress
from schemas.errors import AssetError
from schemas.settings import WeightSettings, local_path

MAX_LISTING_BYTES = 16 * 2**20
TRAINED_FILE = "pytorch_lora_weights.safetensors"  # what diffusers' training scripts write

_HUB_ID = re.compile(
    r"(\w[\w.-]{0,95}/\w[\w.-]{0,95})"  # owner/repo
    r"(?:/((?:\w[\w. ()+=,-]{0,127}/){0,8}\w[\w. ()+=,-]{0,115}\.safetensors))?",  # a file in it
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a file comes from. `write` fills a sink, or returns None if what had the tag is unchanged."""

    key: str  # sources with the same key have the same content
    name: str  # for people
    write: Callable[[BinaryIO, int, Progress, str | None], Awaitable[Downloaded | None]]


class Origins:
    """The grammar of sources, and how each kind is read."""

    def __init__(self, fetcher: Fetcher, settings: WeightSettings, timeout_s: float) -> None:
        self._fetcher = fetcher
        self._settings = settings
        self._hub_url = settings.hub_url.rstrip("/")
        self._timeout_s = timeout_s
        for name, target in settings.names.items():
            if not (_operators_path(target) or self._foreign(target)):
                raise ValueError(f"weights.names.{name} is no file, URL or Hub id: {target!r}")

    def of(self, source: str, base_url: str) -> Origin:
        """Raises AssetError for what is outside of the grammar. Touches neither disk nor network."""
        target = self._settings.names.get(source, source)
        path = _operators_path(target) if source in self._settings.names else None
        if path:
            return Origin(f"file:{path}", source, partial(_copy_local, path))
        key = own_key(target, base_url)
        if key is not None:
            return Origin(f"own:{key}", _printable(key), partial(self._copy_own, key))
        origin = self._foreign(target)
        if origin is None:
            raise unavailable(f"No weights are known by this name. {self._accepted()}")
        return origin

    def _foreign(self, source: str) -> Origin | None:
        if source.lower().startswith(("http://", "https://")):
            name = _printable(source.partition("?")[0].rpartition("/")[2])
            return Origin(f"url:{source}", name, partial(self._download, source))
        match = _HUB_ID.fullmatch(source)
        if match and self._settings.hub and ".." not in source:
            write = partial(self._from_hub, match[1], match[2])
            return Origin(f"hub:{self._hub_url}/{source}", source, write)
        return None

    def _accepted(self) -> str:
        forms = ["an https URL", "a file URL of this server"]
        if self._settings.hub:
            forms += ["a Hub id (owner/repo or owner/repo/file.safetensors)"]
        if self._settings.names:
            forms += [f"one of this server's names ({', '.join(sorted(self._settings.names)[:20])})"]
        return f"Give {', '.join(forms[:-1])} or {forms[-1]}."

    async def _download(
        self, url: str, sink: BinaryIO, limit: int, progress: Progress, etag: str | None
    ) -> Downloaded | None:
        return await self._fetcher.download(
            url, sink, limit, self._timeout_s, progress, etag=etag, internal_http=True
        )

    async def _copy_own(
        self, key: str, sink: BinaryIO, limit: int, progress: Progress, etag: str | None
    ) -> Downloaded | None:
        if etag == key:  # what a key names never changes
            return None
        return replace(await self._fetcher.copy(key, sink, limit, progress), etag=key)

    async def _from_hub(
        self,
        repo: str,
        file: str | None,
        sink: BinaryIO,
        limit: int,
        progress: Progress,
        etag: str | None,
    ) -> Downloaded | None:
        try:
            file = file or await self._choose(repo)
            url = f"{self._hub_url}/{repo}/resolve/main/{quote(file)}"
            return await self._download(url, sink, limit, progress, etag)
        except AssetError as error:
            raise AssetError(f"{repo} on the Hub: {error.message}", error.kind, error.ctx) from error

    async def _choose(self, repo: str) -> str:
        """The one weights file at the top of a repository."""
        listing = BytesIO()
        await self._download(
            f"{self._hub_url}/api/models/{repo}",
            listing,
            MAX_LISTING_BYTES,
            lambda done, total: None,
            None,
        )
        try:
            names = [each.rfilename for each in _Listing.model_validate_json(listing.getvalue()).siblings]
        except ValidationError as error:
            raise unavailable("The list of files could not be read.") from error
        found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
        if TRAINED_FILE in found:
            return TRAINED_FILE
        if len(found) == 1:
            return found[0]
        raise unavailable(
            f"Say which file: {', '.join(f'{repo}/{name}' for name in found[:20])}."
            if found
            else "The repository has no .safetensors file at its top. Name one as owner/repo/folder/file."
        )


class _Sibling(BaseModel):
    rfilename: str


class _Listing(BaseModel):
    """What the Hub's API says of a repository, as far as it is needed."""

    siblings: list[_Sibling]


def _operators_path(target: str) -> Path | None:
    """The path in `file://…`, `/…`, `~…` or `./…`. A request's own words never come here."""
    path = local_path(target, "file")
    if path is None and target.startswith(("/", "~", "./")):
        path = Path(target).expanduser().absolute()
    return path


async def _copy_local(
    path: Path, sink: BinaryIO, limit: int, progress: Progress, etag: str | None
) -> Downloaded | None:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            tag = f"{status.st_size}-{status.st_mtime_ns}"
            if tag == etag:
                return None
            done = await drain(_chunks(file), status.st_size, sink, limit, progress)
            return replace(done, etag=tag)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise unavailable("The server's own file of this name cannot be read.") from error


async def _chunks(file: BinaryIO) -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
        yield chunk


def _printable(name: str) -> str:
    """A word of a caller's URL that may stand in a log line."""
    return re.sub(r"[^\w.-]", "_", name)[:80] or "weights"


def unavailable(message: str) -> AssetError:
    """The error for a source that gives no weights."""
    return AssetError(message, "file_download_error")
