"""The folder that keeps what was downloaded.

A file is stored under the hash of its content, so a name in the folder always means the same bytes.
Beside the files lie records: what a source led to, and when it was last asked. Processes of one
machine may share the folder. They see each other by file locks: a shared lock pins a file while it
is used, an exclusive one marks a download under way.

What consists of several files is given as a folder of links to them, in `folders/`. It is made once, and
its name says what it links to: the links break when a file is evicted, and lead to it again when it is
back. Who uses a folder pins all its files, so one with a broken link is in nobody's use.
"""

import asyncio
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, BinaryIO

from pydantic import BaseModel, Field, ValidationError

from deployments import crash
from deployments.files.choices import unavailable
from deployments.files.fetch import Report as Progress
from deployments.files.flights import Flights, Report
from deployments.files.origins import TEXT, WEIGHTS, Origin
from schemas.settings import WeightSettings, local_path

REPORT_S = 1.0  # the shortest time between two lines about one download
MAX_HEADER_BYTES = 10_000_000
MAX_RECORDS = 10_000


class Lease:
    """A file or folder that stays in place until `release`, or to the end of a `with`, which gives its path.

    The path's name stands for the content.
    """

    def __init__(self, path: Path, release: Callable[[], None]) -> None:
        self.path = path
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let it be evicted. Calling it again does nothing."""
        if self._release:
            release, self._release = self._release, None
            release()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Cache:
    """Files by their content, and what the origins last led to."""

    def __init__(self, settings: WeightSettings, fresh_s: float) -> None:
        folder = local_path(settings.cache, "file")
        if folder is None:
            raise ValueError(f"weights.cache must begin with file://, got {settings.cache!r}")
        self._folder = folder
        self._bytes = settings.cache_bytes
        self._fresh_s = fresh_s
        self._flights: Flights[str] = Flights()
        self._is_crowded = False
        self._folders = folder / "folders"
        self._folders.mkdir(parents=True, exist_ok=True)
        self._sweep()
        self._shrink()

    async def locate(self, origin: Origin, report: Report) -> Lease:
        """The file of an origin, downloaded if need be; `report` gets lines for people. Raises AssetError."""
        while True:  # another process may evict a file before it is pinned here
            lease = self._fresh(origin) or self._lease(await self._join(origin, report))
            if lease:
                return lease

    def gather(self, files: Mapping[str, Lease]) -> Lease:
        """A folder with these files under these names, `unet/config.json`. It takes their leases over.

        The same files under the same names are always the same folder.
        """
        with ExitStack() as held:
            for lease in files.values():
                held.callback(lease.release)
            folder = self._folders / _digest_of(files)
            with self._arranging():
                if not folder.exists():
                    self._arrange(folder, files)
            return Lease(folder, held.pop_all().close)

    def check_integrity(self) -> list[str]:
        """Remove files whose content is not what their name says; returns their names. Reads them all."""
        kept = (path for path in self._folder.iterdir() if path.suffix in (WEIGHTS, TEXT))
        damaged = [path for path in kept if not _is_whole(path)]
        for path in damaged:
            path.unlink(missing_ok=True)
        return [path.name for path in damaged]

    def _fresh(self, origin: Origin) -> Lease | None:
        """The file that the origin led to a short while ago."""
        record = self._recall(origin)
        written = _status(self._record_path(origin))
        if record is None or written is None or not 0 <= time.time() - written.st_mtime < self._fresh_s:
            return None
        return self._lease(record.digest + origin.suffix)

    async def _join(self, origin: Origin, report: Report) -> str:
        """Wait for the one download of an origin; returns the file's name here."""
        return await self._flights.join(origin.key, partial(self._refresh, origin), report)

    async def _refresh(self, origin: Origin, report: Report) -> str:
        """Ask the origin for its content, unless it says that it is still what we have."""
        record = self._recall(origin)
        kept = self._lease(record.digest + origin.suffix) if record else None
        try:
            tag = record.etag if record and kept else None
            with self._partial() as file:
                done = await origin.write(file, origin.limit, _progress(origin.name, report), tag)
                if done is not None:
                    crash.point("cache.downloaded")
                    await asyncio.to_thread(_settle, file, origin.suffix)
                    crash.point("cache.synced")
                    self._publish(file, done.sha256 + origin.suffix)
                    record = _Record(digest=done.sha256, etag=done.etag)
        finally:
            if kept:
                kept.release()
        assert record is not None, "only what we have can be unchanged"
        crash.point("cache.records")
        self._record_path(origin).write_text(record.model_dump_json())
        crash.point("cache.recorded")
        return record.digest + origin.suffix

    @contextmanager
    def _partial(self) -> Iterator[BinaryIO]:
        """A file for a download, gone afterwards unless it was published."""
        while True:
            file = (self._folder / f"{secrets.token_hex(16)}.part").open("x+b")
            crash.point("cache.opened")
            if _lock(file, fcntl.LOCK_EX):
                break
            file.close()  # swept by another process between its creation and the lock
        with file:
            try:
                yield file
            finally:
                Path(file.name).unlink(missing_ok=True)

    @contextmanager
    def _arranging(self) -> Iterator[None]:
        """One process at a time makes and removes folders of links."""
        with (self._folder / "folders.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _arrange(self, folder: Path, files: Mapping[str, Lease]) -> None:
        """Make a folder that is never seen half-made."""
        draft = self._clean_draft()
        for name, lease in files.items():
            link = draft / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(lease.path)
            crash.point("cache.linked")
        draft.rename(folder)
        crash.point("cache.arranged")

    def _disarrange(self) -> None:
        """Remove the folders that have a broken link, and half-made ones of the dead."""
        with self._arranging():
            for folder in self._folders.iterdir():
                if any(each.is_symlink() and not each.exists() for each in folder.rglob("*")):
                    folder.rename(self._clean_draft())
                    crash.point("cache.disarranged")
            self._clean_draft()

    def _clean_draft(self) -> Path:
        """Where one folder at a time is made or taken apart; it is not there."""
        draft = self._folder / "folders.draft"
        shutil.rmtree(draft, ignore_errors=True)
        return draft

    def _publish(self, file: BinaryIO, name: str) -> None:
        """Give a whole and checked download its name. It is pinned until `file` is closed."""
        known = self._lease(name)
        if known:
            known.release()
        else:
            _touch(file)
            fcntl.flock(file, fcntl.LOCK_SH)
            os.replace(file.name, self._folder / name)
            crash.point("cache.published")
        self._shrink()

    def _lease(self, name: str) -> Lease | None:
        """Pin a file, if it is here."""
        path = self._folder / name
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        if not _lock(file, fcntl.LOCK_SH):
            file.close()
            return None
        _touch(file)

        def release() -> None:
            file.close()
            self._relieve()

        return Lease(path, release)

    def _relieve(self) -> None:
        if self._is_crowded:
            self._shrink()

    def _shrink(self) -> None:
        """Evict what was unused for longest until the rest fits, pinned files aside."""
        found = [(path, status) for path in self._folder.iterdir() if (status := _status(path))]
        found.sort(key=lambda each: each[1].st_mtime_ns)
        used = sum(status.st_size for path, status in found if path.suffix in (WEIGHTS, TEXT, ".part"))
        has_evicted = False
        for path, status in found:
            if used > self._bytes and path.suffix in (WEIGHTS, TEXT) and _evict(path):
                used -= status.st_size
                has_evicted = True
        self._is_crowded = used > self._bytes
        if has_evicted:
            self._disarrange()
        records = [path for path, _ in found if path.suffix == ".json"]
        for path in records[: max(0, len(records) - MAX_RECORDS)]:
            path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what dead processes left."""
        for path in self._folder.glob("*.part"):
            _evict(path)
        self._disarrange()

    def _recall(self, origin: Origin) -> "_Record | None":
        try:
            return _Record.model_validate_json(self._record_path(origin).read_bytes())
        except (FileNotFoundError, ValidationError):  # cut short by a crash: as if never written
            return None

    def _record_path(self, origin: Origin) -> Path:
        key = origin.key.encode("utf-8", "surrogatepass")  # hashed: a URL may carry a signature
        return self._folder / f"{hashlib.sha256(key).hexdigest()}.json"


class _Record(BaseModel):
    """What an origin led to. It was last asked when the record was written."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    etag: str | None


_FOREIGN_KINDS = (
    (b"PK\x03\x04", "a zip archive, as PyTorch's .bin, .pt and .ckpt files are"),
    (b"\x80", "a Python pickle"),
    (b"<", "a web page, not the file that it shows"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for"),
    (b"GGUF", "a GGUF file"),
)


def _settle(file: BinaryIO, suffix: str) -> None:
    """Refuse what does not begin as its kind does; bring the rest to the disk. Looks no deeper."""
    file.flush()
    if suffix == WEIGHTS:
        _check_begin(file)
    os.fsync(file.fileno())


def _check_begin(file: BinaryIO) -> None:
    """Refuse what does not begin as safetensors do."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        header = file.read(length)
        if header.startswith(b"{") and header.rstrip(b" ").endswith(b"}"):
            return
    file.seek(0)
    start = file.read(64).lstrip()
    kind = next((kind for magic, kind in _FOREIGN_KINDS if start.startswith(magic)), "something else")
    raise unavailable(f"Weights must be a safetensors file; this is {kind}.")


def _digest_of(files: Mapping[str, Lease]) -> str:
    """The hash that stands for a folder's content."""
    lines = sorted(f"{name}\0{lease.path.name}\n" for name, lease in files.items())
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


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
            crash.point("cache.evicted")
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
