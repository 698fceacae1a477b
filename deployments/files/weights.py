"""Adapter weights that requests name: where they come from, and the folder that keeps them.

A file is stored under the hash of its content, so a name in the folder always means the same bytes.
Beside the files lie records: what a source led to, and when it was last asked. Processes of one
machine may share the folder. They see each other by file locks: a shared lock pins a file while it
is used, an exclusive one marks a download under way.
"""

import asyncio
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, Field, ValidationError

from deployments.files.fetch import Fetcher
from deployments.files.fetch import Report as Progress
from deployments.files.origins import Origin, Origins, unavailable
from schemas.assets import Asset
from schemas.settings import FetchSettings, WeightSettings, local_path

FRESH_S = 600.0  # after so long a source is asked whether its content changed
REPORT_S = 1.0  # the shortest time between two lines about one download
MAX_HEADER_BYTES = 10_000_000
MAX_RECORDS = 10_000

Report = Callable[[str], None]


class Lease:
    """A weights file that stays in place until `release`, or to the end of a `with`, which gives its path."""

    def __init__(self, path: Path, pinned: BinaryIO, released: Callable[[], None]) -> None:
        self.path = path
        self._pinned = pinned
        self._released = released

    def release(self) -> None:
        """Let the file be evicted. Calling it again does nothing."""
        if not self._pinned.closed:
            self._pinned.close()
            self._released()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Weights:
    """Finds weights by what requests call them, and keeps them on disk."""

    def __init__(
        self, fetcher: Fetcher, settings: WeightSettings, fetch: FetchSettings, fresh_s: float = FRESH_S
    ) -> None:
        folder = local_path(settings.cache, "file")
        if folder is None:
            raise ValueError(f"weights.cache must begin with file://, got {settings.cache!r}")
        self._folder = folder
        self._settings = settings
        self._fresh_s = fresh_s
        self._origins = Origins(fetcher, settings, fetch.weights_timeout_s)
        self._limit = min(fetch.max_weights_bytes, settings.cache_bytes)
        self._flights: dict[str, _Flight] = {}
        self._is_crowded = False
        folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        self._shrink()

    async def locate(self, asset: Asset, base_url: str, report: Report) -> Lease:
        """The file that `asset` names, downloaded if need be; `report` gets lines for people.

        Its source is one of the server's own names, an https URL (http inside the allowed networks),
        a file URL of the server at `base_url`, or a Hub id. Raises AssetError.
        """
        origin = self._origins.of(asset, base_url)
        while True:  # another process may evict a file before it is pinned here
            lease = self._fresh(origin) or self._lease(await self._join(origin, report))
            if lease:
                return lease

    def check_integrity(self) -> list[str]:
        """Remove files whose content is not what their name says; returns their names. Reads them all."""
        damaged = [path for path in self._folder.glob("*.safetensors") if not _is_whole(path)]
        for path in damaged:
            path.unlink(missing_ok=True)
        return [path.name for path in damaged]

    def _fresh(self, origin: Origin) -> Lease | None:
        """The file that the origin led to a short while ago."""
        record = self._recall(origin)
        written = _status(self._record_path(origin))
        if record is None or written is None or not 0 <= time.time() - written.st_mtime < self._fresh_s:
            return None
        return self._lease(record.digest)

    async def _join(self, origin: Origin, report: Report) -> str:
        """Wait for the one download of an origin, beginning it if there is none; returns the digest."""
        flight = self._flights.get(origin.key)
        if flight is None:
            flight = self._flights[origin.key] = _Flight(partial(self._refresh, origin))
        try:
            return await flight.join(report)
        finally:
            if flight.is_left and self._flights.get(origin.key) is flight:
                del self._flights[origin.key]

    async def _refresh(self, origin: Origin, report: Report) -> str:
        """Ask the origin for its content, unless it says that it is still what we have."""
        record = self._recall(origin)
        kept = self._lease(record.digest) if record else None
        try:
            tag = record.etag if record and kept else None
            with self._partial() as file:
                done = await origin.write(file, self._limit, _progress(origin.name, report), tag)
                if done is not None:
                    await asyncio.to_thread(_settle, file)
                    self._publish(file, done.sha256)
                    record = _Record(digest=done.sha256, etag=done.etag)
        finally:
            if kept:
                kept.release()
        assert record is not None, "only what we have can be unchanged"
        self._record_path(origin).write_text(record.model_dump_json())
        return record.digest

    @contextmanager
    def _partial(self) -> Iterator[BinaryIO]:
        """A file for a download, gone afterwards unless it was published."""
        while True:
            file = (self._folder / f"{secrets.token_hex(16)}.part").open("x+b")
            if _lock(file, fcntl.LOCK_EX):
                break
            file.close()  # swept by another process between its creation and the lock
        with file:
            try:
                yield file
            finally:
                Path(file.name).unlink(missing_ok=True)

    def _publish(self, file: BinaryIO, digest: str) -> None:
        """Give a whole and checked download its name. It is pinned until `file` is closed."""
        known = self._lease(digest)
        if known:
            known.release()
        else:
            _touch(file)
            fcntl.flock(file, fcntl.LOCK_SH)
            os.replace(file.name, self._path(digest))
        self._shrink()

    def _lease(self, digest: str) -> Lease | None:
        """Pin a file, if it is here."""
        try:
            file = self._path(digest).open("rb")
        except FileNotFoundError:
            return None
        if not _lock(file, fcntl.LOCK_SH):
            file.close()
            return None
        _touch(file)
        return Lease(self._path(digest), file, self._relieve)

    def _relieve(self) -> None:
        if self._is_crowded:
            self._shrink()

    def _shrink(self) -> None:
        """Evict what was unused for longest until the rest fits, pinned files aside."""
        found = [(path, status) for path in self._folder.iterdir() if (status := _status(path))]
        found.sort(key=lambda each: each[1].st_mtime_ns)
        used = sum(status.st_size for path, status in found if path.suffix != ".json")
        for path, status in found:
            if used > self._settings.cache_bytes and path.suffix == ".safetensors" and _evict(path):
                used -= status.st_size
        self._is_crowded = used > self._settings.cache_bytes
        records = [path for path, _ in found if path.suffix == ".json"]
        for path in records[: max(0, len(records) - MAX_RECORDS)]:
            path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what downloads of dead processes left."""
        for path in self._folder.glob("*.part"):
            _evict(path)

    def _recall(self, origin: Origin) -> "_Record | None":
        try:
            return _Record.model_validate_json(self._record_path(origin).read_bytes())
        except (FileNotFoundError, ValidationError):  # cut short by a crash: as if never written
            return None

    def _record_path(self, origin: Origin) -> Path:
        key = origin.key.encode("utf-8", "surrogatepass")  # hashed: a URL may carry a signature
        return self._folder / f"{hashlib.sha256(key).hexdigest()}.json"

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"


class _Record(BaseModel):
    """What an origin led to. It was last asked when the record was written."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    etag: str | None


class _Flight:
    """One download that several callers wait for. It ends early when the last of them leaves."""

    def __init__(self, work: Callable[[Report], Coroutine[Any, Any, str]]) -> None:
        self._reports: list[Report] = []
        self._task = asyncio.create_task(work(self._tell))

    @property
    def is_left(self) -> bool:
        return not self._reports

    async def join(self, report: Report) -> str:
        self._reports.append(report)
        try:
            return await asyncio.shield(self._task)
        finally:
            self._reports.remove(report)
            if self.is_left:
                self._task.cancel()

    def _tell(self, line: str) -> None:
        for report in self._reports:
            report(line)


_FOREIGN_KINDS = (
    (b"PK\x03\x04", "a zip archive, as PyTorch's .bin, .pt and .ckpt files are"),
    (b"\x80", "a Python pickle"),
    (b"<", "a web page, not the file that it shows"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for"),
    (b"GGUF", "a GGUF file"),
)


def _settle(file: BinaryIO) -> None:
    """Refuse what does not begin as safetensors do; bring the rest to the disk. Looks no deeper."""
    file.flush()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        header = file.read(length)
        if header.startswith(b"{") and header.rstrip(b" ").endswith(b"}"):
            os.fsync(file.fileno())
            return
    file.seek(0)
    start = file.read(64).lstrip()
    kind = next((kind for magic, kind in _FOREIGN_KINDS if start.startswith(magic)), "something else")
    raise unavailable(f"Weights must be a safetensors file; this is {kind}.")


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == path.stem
    except FileNotFoundError:  # evicted meanwhile
        return True


def _lock(file: BinaryIO, kind: int) -> bool:
    """Lock an open file without waiting. False: another holds it, or it has been removed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(file.fileno()).st_nlink > 0


def _touch(file: BinaryIO) -> None:
    """Note the time of the last use, finer than the kernel's own clock of files."""
    now = time.time_ns()
    os.utime(file.fileno(), ns=(now, now))


def _evict(path: Path) -> bool:
    """Remove a file that nobody, in any process, holds a lock on."""
    try:
        with path.open("rb") as file:
            if not _lock(file, fcntl.LOCK_EX):
                return False
            path.unlink()
    except FileNotFoundError:
        pass
    return True


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # another process was faster
        return None


def _progress(name: str, report: Report) -> Progress:
    """Turns counts into lines, one a second at most."""
    told_at = float("-inf")

    def progress(done: int, total: int | None) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= REPORT_S:
            told_at = time.monotonic()
            of_total = f" of {total / 1e6:.0f}" if total else ""
            report(f"downloading {name}: {done / 1e6:.0f}{of_total} MB")

    return progress
