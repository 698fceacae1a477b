"""Objects in a folder of this machine."""

import asyncio
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from obstore.store import LocalStore

from deployments.files.place import Redirect
from deployments.files.signatures import load_secret

BLOCK_BYTES = 2**18


class Folder:
    """See Place. The folder is made when absent."""

    block_bytes = BLOCK_BYTES

    def __init__(self, path: Path) -> None:
        self.path = path
        self.objects = LocalStore(path, mkdir=True)

    def url(self, name: str) -> str:
        return f"{self.path.as_uri()}/{name}"

    def secret(self) -> bytes:
        return load_secret(self.path / "secret")

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.path).free

    def attributes(self, told: Mapping[str, str]) -> None:
        """A file system keeps none."""

    async def redirect(self, name: str, left_s: float | None) -> Redirect | None:
        return None

    async def clear(self, folder: str) -> None:
        await asyncio.to_thread(shutil.rmtree, self.path / folder, ignore_errors=True)

    async def clear_left(self, folder: str, end: float) -> None:
        await asyncio.to_thread(self._clear_left, folder, end)

    def _clear_left(self, folder: str, end: float) -> None:
        """A folder changes with every file that comes."""
        for begun in _unchanged((self.path / folder).glob("*"), end):
            shutil.rmtree(begun, ignore_errors=True)
        for torn in _unchanged(self.path.rglob("*#*"), end):
            torn.unlink(missing_ok=True)


def _unchanged(paths: Iterable[Path], end: float) -> list[Path]:
    """What goes meanwhile is another's."""
    return [path for path in paths if (changed := _changed_at(path)) is not None and changed <= end]


def _changed_at(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
