"""Where files are kept: one object store, by keys that nobody can guess.

    KEY                a file: RANDOM.png or RANDOM-END.png of ours, RANDOM_cat.png of a client
    details/KEY        what is known of a file that a client sent
    expiring/END_KEY   stands for a file that is to be removed, from before the file is there

END is the unix second from which on the file is no longer shown.

No other name has the form of a key, and only keys can be opened; see `uploads` for the rest, and `sweeper`
for what is removed.
"""

import errno
import math
import mimetypes
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import obstore
from obstore.exceptions import BaseError
from pydantic import BaseModel, ConfigDict

from deployments import crash
from deployments.files import shown
from deployments.files.bucket import Bucket
from deployments.files.folder import Folder
from deployments.files.place import Place, Redirect
from schemas.errors import StoreDown, StoreFull
from schemas.settings import local_path

KEY_BYTES = 16  # 128 random bits in a name
MAX_NAME = 80  # characters of a client's file name that stay in a key
CHUNK_BYTES = 2**18  # what is read at once

Clock = Callable[[], float]
# In the words of the library's Rust: the disk, the account's share of it, or what a process may write.
_NO_ROOM = tuple(f"(os error {number})" for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


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
    """Saves bytes under names of our own, opens them again, says by which URL a client reads them.

    Every method that asks the place raises StoreDown when that fails.
    """

    def __init__(self, place: Place, clock: Clock = time.time) -> None:
        self.place = place
        self.objects = place.objects
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
            crash.point("save.marked")
        attributes = self.place.attributes(shown.headers(content_type, None, keep_s))
        try:
            with told():
                await obstore.put_async(self.objects, key, data, attributes=attributes)
        except StoreFull as error:  # it is not what the request asked for that is too much
            raise StoreDown("The pictures cannot be stored at this moment; try again later.") from error
        crash.point("save.put")
        return key

    @property
    def free_bytes(self) -> float:
        """What the disk has left; infinite where there is none to be full."""
        free = self.place.free_bytes()
        return math.inf if free is None else free

    def check_room(self, least_bytes: int) -> None:
        """Raise StoreFull when less than that is free."""
        if self.free_bytes < least_bytes:
            raise StoreFull()

    async def let_expire(self, key: str, expires_at: float) -> None:
        """Have the sweeper remove a file that is about to be written. Unix seconds."""
        with told():
            await obstore.put_async(self.objects, f"expiring/{int(expires_at)}_{key}", b"")

    async def open(self, key: str) -> StoredFile | None:
        """The file of a key, or None. What is no key is None without a look."""
        facts = await self._facts(key)
        if facts is None:
            return None
        try:
            with told():
                found = await obstore.get_async(self.objects, key)
        except FileNotFoundError:
            return None
        tag = key[: 2 * KEY_BYTES]
        size = found.meta["size"]
        return StoredFile(tag, size, facts.content_type, sent_name(key), facts.left_s, _chunks(found))

    async def redirect(self, key: str) -> Redirect | None:
        """Where a client may read the file without us; None also where there is no file."""
        facts = await self._facts(key)
        if facts is None or not await self.is_there(key):
            return None
        with told():
            return await self.place.redirect(key, facts.left_s)

    async def leads_to(self) -> str | None:
        """A URL of the host that redirects lead to, if there are any."""
        with told():
            place = await self.place.redirect("picture", None)
        return place.url if place is not None else None

    async def read(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` to before `end` of a file that has been opened."""
        with told():
            found = await obstore.get_async(self.objects, key, options={"range": (start, end)})
        async for chunk in _chunks(found):
            yield chunk

    async def content(self, key: str) -> bytes | None:
        """All of a file that is small enough for it, or None."""
        found = await self.open(key)
        return None if found is None else b"".join([chunk async for chunk in found.chunks])

    async def remove(self, key: str) -> None:
        """Remove a file for good. What is no key, or is gone already, is no fault. Raises StoreDown."""
        if await self._facts(key) is None:
            return
        try:
            with told():
                await obstore.delete_async(self.objects, key)
                crash.point("file.removed")
        except FileNotFoundError:
            pass  # another call was faster

    async def has(self, key: str) -> bool:
        """Whether `open` would find the file."""
        return await self._facts(key) is not None and await self.is_there(key)

    async def is_there(self, name: str) -> bool:
        """Whether the store has an object of this name."""
        try:
            with told():
                await obstore.head_async(self.objects, name)
        except FileNotFoundError:
            return False
        return True

    async def details(self, key: str) -> Details | None:
        """What is known of a file that a client sent, or is about to send."""
        try:
            with told():
                found = await obstore.get_async(self.objects, f"details/{key}")
                text = bytes(await found.bytes_async())
        except FileNotFoundError:
            return None
        return Details.model_validate_json(text)

    def url(self, key: str, base_url: str) -> str:
        """Where a client finds the key: on the server at `base_url`, or in the store itself."""
        return f"{base_url}/files/{key}" if base_url else self.place.url(key)

    async def _facts(self, key: str) -> "_Facts | None":
        """None for what is no key, and for a file whose time is over."""
        expires_at: float | None
        if made := _MADE.fullmatch(key):
            content_type, expires_at = _TYPES[made[2]], float(made[1]) if made[1] else None
        elif sent_name(key) and (details := await self.details(key)):
            content_type, expires_at = details.content_type, details.expires_at
        else:
            return None
        left_s = None if expires_at is None else expires_at - self.clock()
        return None if left_s is not None and left_s <= 0 else _Facts(content_type, left_s)


@dataclass(frozen=True, slots=True)
class _Facts:
    content_type: str
    left_s: float | None


def new_key(name: str | None, content_type: str) -> str:
    """A key for a file that a client will send: the end of its name stays, in plain letters."""
    name = name or f"file{mimetypes.guess_extension(content_type.partition(';')[0]) or ''}"
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", re.split(r"[/\\]", name)[-1])
    return f"{secrets.token_hex(KEY_BYTES)}_{plain[-MAX_NAME:].lstrip('.') or 'file'}"


def sent_name(key: str) -> str | None:
    """What a client called its file, in plain letters; None for what is no key of such a file."""
    sent = _SENT.fullmatch(key)
    return sent and sent[1]


@contextmanager
def told() -> Iterator[None]:
    """Tell a caller that the store failed, and no more."""
    try:
        yield
    except BaseError as error:
        if any(words in str(error) for words in _NO_ROOM):
            raise StoreFull() from error
        raise StoreDown("The file store cannot be used at this moment; try again.") from error


async def _chunks(found: "obstore.GetResult") -> AsyncIterator[bytes]:
    with told():
        async for chunk in found.stream(CHUNK_BYTES):
            yield bytes(chunk)


def open_files(url: str, clock: Clock = time.time) -> FileStore:
    """Open the store at `file://PATH` or `s3://BUCKET/PREFIX?…`. Raises ValueError for any other URL."""
    if url.startswith("s3://"):
        return FileStore(Bucket(url), clock)
    path = local_path(url, "file")
    if path is None:
        raise ValueError(f"files_url must begin with file:// or s3://, got {url.partition('://')[0]!r}")
    return FileStore(Folder(path), clock)
