"""What a request may call weights, and how each kind of source is read."""

import asyncio
import os
import posixpath
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import BinaryIO

from deployments.files.choices import listed, unavailable
from deployments.files.fetch import CHUNK_BYTES, Downloaded, Fetcher, drain, own_key
from deployments.files.fetch import Report as Progress
from deployments.files.hub import Hub, Write
from schemas.assets import Asset, AssetKind
from schemas.settings import EASYCONTROLS, ModelSettings, WeightSettings, local_path

WEIGHTS, TEXT = ".safetensors", ".text"  # what an origin leads to, as the suffix of its file here
MAX_TEXT_BYTES = 8 * 2**20  # SDXL's tokenizer.json has 4 MB

_BASES = (AssetKind.BASE, AssetKind.UNET)  # governed by the settings of `bases`
_HUB_ID = re.compile(
    r"(\w[\w.-]{0,95}/\w[\w.-]{0,95})"  # owner/repo
    r"(?:/((?:\w[\w. ()+=,-]{0,127}/){0,8}\w[\w. ()+=,-]{0,115}\.safetensors))?",  # a file in it
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a file comes from."""

    key: str  # sources with the same key have the same content
    name: str  # for people
    write: Write
    limit: int  # bytes
    suffix: str = WEIGHTS


@dataclass(frozen=True, slots=True)
class Repository:
    """One of the Hub; what it has will tell which of its files the asset means."""

    name: str  # owner/repo
    asset: Asset
    limit: int  # bytes of all files together


class Origins:
    """The grammar of sources, and how each kind is read."""

    def __init__(
        self, fetcher: Fetcher, hub: Hub, settings: ModelSettings, source: Callable[[str], Path | str]
    ) -> None:
        self._fetcher = fetcher
        self._hub = hub
        self._settings = settings.weights
        self._allow = settings.bases.allow
        self._timeout_s = settings.fetch.weights_timeout_s
        self._limit = min(settings.fetch.max_weights_bytes, settings.weights.cache_bytes)
        self._base_limit = min(settings.bases.max_bytes, settings.weights.cache_bytes)
        self._methods = _reachable_methods(settings.weights)
        self._model = settings.model
        self._resident = source(settings.model)
        self._bases = {name: source(target) for name, target in settings.bases.names.items()}
        self._faces = {name: Path(folder).expanduser() for name, folder in settings.faces.items()}
        self._check("weights.names", settings.weights.names)
        self._check("weights.easycontrols", self._methods)
        self._check_bases()
        self._check_folders()

    def of(self, asset: Asset, base_url: str) -> Origin | Repository | Path:
        """Where an asset comes from; a path is the operator's own. A caller's word touches no disk here.

        Raises AssetError for what is outside of the grammar, or not allowed.
        """
        if asset.kind is AssetKind.FACE_ANALYSIS:
            return self._face(asset.source)
        if asset.kind is AssetKind.BASE and self._is_resident(asset.source):
            return Path(self._model)
        target = self._names(asset.kind).get(asset.source)
        if target is not None:
            return self._operators(asset, target)
        if asset.kind in _BASES and not self._is_allowed(asset.source, base_url):
            raise unavailable(self._not_served())
        found = self._own(asset, base_url) or self._foreign(asset)
        if found is None:
            raise unavailable(self._refusal(asset.kind))
        return found

    def file_in(self, repository: Repository, file: str, part: str | None = None) -> Origin:
        """A file of a repository; `part` is how a file of several is called for people."""
        origin = self._hub_file(repository.name, file, repository.limit)
        if part is not None:
            origin = replace(origin, name=f"{repository.name}: {part}")
        return origin if file.endswith(WEIGHTS) else replace(origin, suffix=TEXT, limit=MAX_TEXT_BYTES)

    def _is_resident(self, source: str) -> bool:
        """Whether this is the model that the server has started with, by that word or by a name for it."""
        return source == self._model or self._bases.get(source) == self._resident

    def _check(self, table: str, names: Mapping[str, str]) -> None:
        """Stop the start for a name that leads nowhere."""
        for name, target in names.items():
            if not (_operators_path(target) or self._foreign(Asset(AssetKind.LORA, target))):
                raise ValueError(f"{table}.{name} is no file, URL or Hub id: {target!r}")

    def _check_bases(self) -> None:
        for name, target in self._bases.items():
            if isinstance(target, str) and not self._foreign(Asset(AssetKind.BASE, target)):
                raise ValueError(f"bases.names.{name} is no file or folder here, URL or Hub id: {target!r}")

    def _check_folders(self) -> None:
        for name, folder in self._faces.items():
            if not folder.is_dir():
                raise ValueError(f"faces.{name} is no folder: {str(folder)!r}")

    def _names(self, kind: AssetKind) -> Mapping[str, str | Path]:
        """What this server's own names lead to, the built-in methods first."""
        if kind in _BASES:
            return self._bases
        if kind is AssetKind.EASYCONTROL:
            return self._settings.names | self._methods
        return self._settings.names

    def _face(self, name: str) -> Path:
        if not self._faces:
            raise unavailable("This server has no face analysis.")
        if name not in self._faces:
            raise unavailable(f"This server's models for faces are {listed(self._faces)}.")
        return self._faces[name]

    def _operators(self, asset: Asset, target: str | Path) -> Origin | Repository | Path:
        """What a name of this server leads to. It may be a repository, for the request to choose in."""
        if isinstance(target, Path):
            if not target.exists():
                raise unavailable("The server's own model of this name cannot be read.")
            return target
        path = _operators_path(target)
        if path:
            return Origin(f"file:{path}", asset.source, partial(_copy_local, path), self._limit_of(asset))
        variant = asset.variant if asset.kind in _BASES else None  # else it stands for one file
        found = self._foreign(replace(asset, source=target, variant=variant))
        assert found is not None, "names are checked at the start"
        return found

    def _own(self, asset: Asset, base_url: str) -> Origin | None:
        key = own_key(asset.source, base_url)
        if key is None:
            return None
        return Origin(f"own:{key}", _printable(key), partial(self._copy_own, key), self._limit_of(asset))

    def _foreign(self, asset: Asset) -> Origin | Repository | None:
        source, limit = asset.source, self._limit_of(asset)
        if source.lower().startswith(("http://", "https://")):
            return self._url(source, limit, takes_own=asset.kind not in _BASES or "*" in self._allow)
        match = _HUB_ID.fullmatch(source)
        if match is None or not self._settings.hub or ".." in source:
            return None
        repo, file = match.groups()
        if file and asset.kind is AssetKind.IMAGE_ENCODER:  # its config is looked for
            asset = replace(asset, folder=posixpath.dirname(file), file=posixpath.basename(file))
        elif file:
            return self._hub_file(repo, file, limit)
        return Repository(repo, asset, limit)

    def _url(self, url: str, limit: int, takes_own: bool) -> Origin:
        name = _printable(url.partition("?")[0].rpartition("/")[2])
        key = f"url:{url}" if takes_own else f"web:{url}"
        return Origin(key, name, partial(self._download, url, takes_own), limit)

    def _hub_file(self, repo: str, file: str, limit: int) -> Origin:
        name = f"{repo}/{file}"
        return Origin(f"hub:{self._hub.url}/{name}", name, self._hub.file(repo, file), limit)

    def _limit_of(self, asset: Asset) -> int:
        return self._base_limit if asset.kind in _BASES else self._limit

    def _is_allowed(self, source: str, base_url: str) -> bool:
        """By the source's text. A host's name says nothing of a file that a caller has sent here."""
        if own_key(source, base_url) is not None:
            return "*" in self._allow
        return any(fnmatchcase(source, pattern) for pattern in self._allow)

    def _not_served(self) -> str:
        served = [listed(names) for names in (self._bases, self._allow) if names]
        return f"This server does not serve this model. It serves {' and '.join(served) or 'its own only'}."

    def _refusal(self, kind: AssetKind) -> str:
        """What is wrong with a word that leads nowhere, and what to give instead."""
        forms = ["an https URL", "a file URL of this server"]
        if self._settings.hub:
            forms += ["a Hub id (owner/repo or owner/repo/file.safetensors)"]
        names = self._bases if kind in _BASES else self._settings.names
        if names:
            forms += [f"one of this server's names ({listed(names)})"]
        problem = "No weights are known by this name."
        if kind is AssetKind.EASYCONTROL:
            problem = "This is an unknown control method."
            forms += [f"a built-in method ({listed(self._methods)})"] if self._methods else []
        return f"{problem} Give {', '.join(forms[:-1])} or {forms[-1]}."

    async def _download(
        self, url: str, takes_own: bool, sink: BinaryIO, limit: int, progress: Progress, etag: str | None
    ) -> Downloaded | None:
        return await self._fetcher.download(
            url,
            sink,
            limit,
            self._timeout_s,
            progress,
            etag=etag,
            internal_http=True,
            takes_own=takes_own,
        )

    async def _copy_own(
        self, key: str, sink: BinaryIO, limit: int, progress: Progress, etag: str | None
    ) -> Downloaded | None:
        return None if etag == key else await self._fetcher.copy(key, sink, limit, progress)


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
