"""What a request may call weights, and how each kind of source is read."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from deployments.files.fetch import CHUNK_BYTES, Downloaded, Fetcher, drain, own_key
from deployments.files.fetch import Report as Progress
from schemas.assets import Asset, AssetKind
from schemas.errors import AssetError
from schemas.settings import EASYCONTROLS, WeightSettings, local_path

MAX_LISTING_BYTES = 16 * 2**20

_USUAL_NAMES = {  # of the files that diffusers writes
    AssetKind.LORA: "pytorch_lora_weights",
    AssetKind.CONTROLNET: "diffusion_pytorch_model",
    AssetKind.EASYCONTROL: "pytorch_lora_weights",
}
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
        self._methods = _reachable_methods(settings)
        self._check("names", settings.names)
        self._check("easycontrols", self._methods)

    def of(self, asset: Asset, base_url: str) -> Origin:
        """Raises AssetError for what is outside of the grammar. Touches neither disk nor network."""
        target = self._names(asset.kind).get(asset.source)
        if target is not None:
            path = _operators_path(target)
            if path:
                return Origin(f"file:{path}", asset.source, partial(_copy_local, path))
            asset = Asset(asset.kind, target)  # a name stands for one file, whatever the variant
        key = own_key(asset.source, base_url)
        if key is not None:
            return Origin(f"own:{key}", _printable(key), partial(self._copy_own, key))
        origin = self._foreign(asset)
        if origin is None:
            raise unavailable(self._refusal(asset.kind))
        return origin

    def _check(self, table: str, names: Mapping[str, str]) -> None:
        """Stop the start for a name that leads nowhere."""
        for name, target in names.items():
            if not (_operators_path(target) or self._foreign(Asset(AssetKind.LORA, target))):
                raise ValueError(f"weights.{table}.{name} is no file, URL or Hub id: {target!r}")

    def _names(self, kind: AssetKind) -> Mapping[str, str]:
        """What this server's own names lead to, the built-in methods first."""
        if kind is AssetKind.EASYCONTROL:
            return self._settings.names | self._methods
        return self._settings.names

    def _foreign(self, asset: Asset) -> Origin | None:
        source = asset.source
        if source.lower().startswith(("http://", "https://")):
            name = _printable(source.partition("?")[0].rpartition("/")[2])
            return Origin(f"url:{source}", name, partial(self._download, source))
        match = _HUB_ID.fullmatch(source)
        if match and self._settings.hub and ".." not in source:
            repo, file = match.groups()
            key = source if file else f"{repo}?{_usual_file(asset)}"
            return Origin(f"hub:{self._hub_url}/{key}", source, partial(self._from_hub, repo, file, asset))
        return None

    def _refusal(self, kind: AssetKind) -> str:
        """What is wrong with a word that leads nowhere, and what to give instead."""
        forms = ["an https URL", "a file URL of this server"]
        if self._settings.hub:
            forms += ["a Hub id (owner/repo or owner/repo/file.safetensors)"]
        if self._settings.names:
            forms += [f"one of this server's names ({_listed(self._settings.names)})"]
        problem = "No weights are known by this name."
        if kind is AssetKind.EASYCONTROL:
            problem = "This is an unknown control method."
            forms += [f"a built-in method ({_listed(self._methods)})"] if self._methods else []
        return f"{problem} Give {', '.join(forms[:-1])} or {forms[-1]}."

    async def _download(
        self, url: str, sink: BinaryIO, limit: int, progress: Progress, etag: str | None
    ) -> Downloaded | None:
        return await self._fetcher.download(
            url, sink, limit, self._timeout_s, progress, etag=etag, internal_http=True
        )

    async def _copy_own(
        self, key: str, sink: BinaryIO, limit: int, progress: Progress, etag: str | None
    ) -> Downloaded | None:
        return None if etag == key else await self._fetcher.copy(key, sink, limit, progress)

    async def _from_hub(
        self,
        repo: str,
        file: str | None,
        asset: Asset,
        sink: BinaryIO,
        limit: int,
        progress: Progress,
        etag: str | None,
    ) -> Downloaded | None:
        try:
            file = file or _choose(repo, await self._list(repo), asset)
            url = f"{self._hub_url}/{repo}/resolve/main/{quote(file)}"
            return await self._download(url, sink, limit, progress, etag)
        except AssetError as error:
            raise AssetError(f"{repo} on the Hub: {error.message}", error.kind, error.ctx) from error

    async def _list(self, repo: str) -> list[str]:
        """The files of a repository."""
        listing = BytesIO()
        await self._download(
            f"{self._hub_url}/api/models/{repo}",
            listing,
            MAX_LISTING_BYTES,
            lambda done, total: None,
            None,
        )
        try:
            return [each.rfilename for each in _Listing.model_validate_json(listing.getvalue()).siblings]
        except ValidationError as error:
            raise unavailable("The list of files could not be read.") from error


class _Sibling(BaseModel):
    rfilename: str


class _Listing(BaseModel):
    """What the Hub's API says of a repository, as far as it is needed."""

    siblings: list[_Sibling]


def _usual_file(asset: Asset) -> str:
    """What diffusers calls the file of such weights, and of their variant."""
    variant = f".{asset.variant}" if asset.variant else ""
    return f"{_USUAL_NAMES[asset.kind]}{variant}.safetensors"


def _choose(repo: str, files: list[str], asset: Asset) -> str:
    """The file at the top of a repository that is meant when none is named."""
    found = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    usual = _usual_file(asset)
    if usual in found:
        return usual
    if not found:
        raise unavailable(
            "The repository has no .safetensors file at its top. Name one as owner/repo/folder/file."
        )
    if len(found) == 1 and not asset.variant:
        return found[0]
    problem = f"It has no variant {asset.variant}, which would be {usual}. " if asset.variant else ""
    raise unavailable(f"{problem}Say which file: {_listed(f'{repo}/{name}' for name in found)}.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:20])


def _reachable_methods(settings: WeightSettings) -> dict[str, str]:
    """EasyControl's methods; without the Hub, those that the operator has put elsewhere."""
    return {
        name: target
        for name, target in settings.easycontrols.items()
        if settings.hub or target != EASYCONTROLS.get(name)
    }


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
