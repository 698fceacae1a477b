"""Where files are kept: one object store, by keys that nobody can guess.

    KEY                a file: RANDOM.png or RANDOM-END.png of ours, RANDOM_cat.png of a client
    details/KEY        what is known of a file that a client sent
    expiring/END_KEY   stands for a file that is to be removed, from before the file is there

END is the unix second from which on the file is no longer shown.

No other name has the form of a key, and only keys can be opened; see `uploads` for the rest, and `sweeper`
for what is removed.
"""

import mimetypes
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.store import LocalStore
from pydantic import BaseModel, ConfigDict

from schemas.settings import local_path

KEY_BYTES = 16  # 128 random bits in a name
MAX_NAME = 80  # characters of a client's file name that stay in a key
CHUNK_BYTES = 2**18  # what is read, or written, at once. A store of Amazon's takes 5 MiB at least

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file to be read. `name` is what its sender called it."""

    tag: str  # the same for ever: what a key names never changes
    size: int
    content_type: str
    name: str | None
    left_s: float | None  # how long it is still shown; None: for good
    chunks: AsyncIterator[bytes]


class Details(BaseModel):
    """What is known of a file that a client sent."""

    model_config = ConfigDict(frozen=True)

    content_type: str  # as the client says
    content: str  # of which parts it is made; the same parts are the same file
    expires_at: float | None = None  # unix seconds


_EXTENSIONS = {
    "image/jpeg": "jpg",
    "image/png": "png",
    "image/webp": "webp",
    "application/x-tar": "tar",
}
_TYPES = {extension: kind for kind, extension in _EXTENSIONS.items()}
_RANDOM = rf"[0-9a-f]{{{2 * KEY_BYTES}}}"
_MADE = re.compile(rf"{_RANDOM}(?:-(\d{{1,12}}))?\.({'|'.join(_TYPES)})", re.ASCII)
_SENT = re.compile(rf"{_RANDOM}_([A-Za-z0-9_-][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}})")


class FileStore:
    """Saves bytes under names of our own, opens them again, says by which URL a client reads them."""

    def __init__(self, objects: LocalStore, folder: Path, clock: Clock = time.time) -> None:
        self.objects = objects
        self.folder = folder
        self.clock = clock

    async def save(self, data: bytes, content_type: str, keep_s: float | None = None) -> str:
        """Keep a picture or a tar of them, for good or for a while; returns its key.

        The file is whole before the key exists.
        """
        key = f"{secrets.token_hex(KEY_BYTES)}.{_EXTENSIONS[content_type]}"
        if keep_s is not None:
            expires_at = int(self.clock() + keep_s)
            key = key.replace(".", f"-{expires_at}.")
            await self.let_expire(key, expires_at)
        await obstore.put_async(self.objects, key, data)
        return key

    async def let_expire(self, key: str, expires_at: float) -> None:
        """Have the sweeper remove a file that is about to be written. Unix seconds."""
        await obstore.put_async(self.objects, f"expiring/{int(expires_at)}_{key}", b"")

    async def open(self, key: str) -> StoredFile | None:
        """The file of a key, or None. What is no key is None without a look."""
        facts = await self._facts(key)
        if facts is None:
            return None
        try:
            found = await obstore.get_async(self.objects, key)
        except FileNotFoundError:
            return None
        sent = _SENT.fullmatch(key)
        left_s = None if facts.expires_at is None else facts.expires_at - self.clock()
        tag = key[: 2 * KEY_BYTES]
        name = sent and sent[1]
        return StoredFile(tag, found.meta["size"], facts.content_type, name, left_s, _chunks(found))

    async def read(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` to before `end` of a file that has been opened."""
        found = await obstore.get_async(self.objects, key, options={"range": (start, end)})
        async for chunk in _chunks(found):
            yield chunk

    async def has(self, key: str) -> bool:
        """Whether `open` would find the file."""
        return await self._facts(key) is not None and await self.is_there(key)

    async def is_there(self, name: str) -> bool:
        """Whether the store has an object of this name."""
        try:
            await obstore.head_async(self.objects, name)
        except FileNotFoundError:
            return False
        return True

    async def details(self, key: str) -> Details | None:
        """What is known of a file that a client sent, or is about to send."""
        try:
            found = await obstore.get_async(self.objects, f"details/{key}")
        except FileNotFoundError:
            return None
        return Details.model_validate_json(bytes(await found.bytes_async()))

    def url(self, key: str, base_url: str) -> str:
        """Where a client finds the key: on the server at `base_url`, or in the store itself."""
        return f"{base_url}/files/{key}" if base_url else f"{self.folder.as_uri()}/{key}"

    async def _facts(self, key: str) -> "_Facts | None":
        """None for what is no key, and for a file whose time is over."""
        if made := _MADE.fullmatch(key):
            facts = _Facts(_TYPES[made[2]], float(made[1]) if made[1] else None)
        elif is_sent(key) and (details := await self.details(key)):
            facts = _Facts(details.content_type, details.expires_at)
        else:
            return None
        is_over = facts.expires_at is not None and facts.expires_at <= self.clock()
        return None if is_over else facts


@dataclass(frozen=True, slots=True)
class _Facts:
    content_type: str
    expires_at: float | None  # unix seconds


def new_key(name: str | None, content_type: str) -> str:
    """A key for a file that a client will send: the end of its name stays, in plain letters."""
    name = name or f"file{mimetypes.guess_extension(content_type.partition(';')[0]) or ''}"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", re.split(r"[/\\]", name)[-1])
    return f"{secrets.token_hex(KEY_BYTES)}_{plain[-MAX_NAME:].lstrip('.') or 'file'}"


def is_sent(key: str) -> bool:
    """Whether the key has the form of a client's file."""
    return _SENT.fullmatch(key) is not None


async def _chunks(found: "obstore.GetResult") -> AsyncIterator[bytes]:
    async for chunk in found.stream(CHUNK_BYTES):
        yield bytes(chunk)


def open_files(url: str, clock: Clock = time.time) -> FileStore:
    """Open the store at `file://PATH`; the folder is made when absent."""
    path = local_path(url, "file")
    if path is None:
        raise ValueError(f"files_url must begin with file://, got {url!r}")
    return FileStore(LocalStore(path, mkdir=True), path, clock)
