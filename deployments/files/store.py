"""Where pictures are kept: one object store, by keys that nobody can guess."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

import obstore
from obstore.store import LocalStore

from schemas.settings import local_path

KEY_BYTES = 16  # 128 random bits in a name


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file to be read."""

    size: int
    content_type: str
    chunks: AsyncIterator[bytes]


_EXTENSIONS = {"image/jpeg": "jpg", "image/png": "png", "image/webp": "webp"}
_TYPES = {extension: kind for kind, extension in _EXTENSIONS.items()}


class FileStore:
    """Saves bytes under names of our own, opens them again, says by which URL a client reads them."""

    def __init__(self, store: LocalStore, root_url: str) -> None:
        self._store = store
        self._root_url = root_url

    async def save(self, data: bytes, content_type: str) -> str:
        """Keep `data`; returns its key. The file is whole before the key exists."""
        key = f"{secrets.token_hex(KEY_BYTES)}.{_EXTENSIONS[content_type]}"
        await obstore.put_async(self._store, key, data)
        return key

    async def open(self, key: str) -> StoredFile | None:
        """The file of a key that `save` gave, or None. Any other string is None, without a look."""
        name, _, extension = key.partition(".")
        known = len(name) == 2 * KEY_BYTES and set(name) <= set("0123456789abcdef")
        if not known or extension not in _TYPES:
            return None
        try:
            found = await obstore.get_async(self._store, key)
        except FileNotFoundError:
            return None
        return StoredFile(found.meta["size"], _TYPES[extension], _chunks(found))

    def url(self, key: str, base_url: str) -> str:
        """Where a client finds the key: on the server at `base_url`, or in the store itself."""
        return f"{base_url}/files/{key}" if base_url else f"{self._root_url}/{key}"


async def _chunks(found: "obstore.GetResult") -> AsyncIterator[bytes]:
    async for chunk in found:
        yield bytes(chunk)


def open_files(url: str) -> FileStore:
    """Open the store at `file://PATH`; the folder is made when absent."""
    path = local_path(url, "file")
    if path is None:
        raise ValueError(f"files_url must begin with file://, got {url!r}")
    return FileStore(LocalStore(path, mkdir=True), path.as_uri())
