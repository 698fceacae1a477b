"""Uploads as a gateway makes them, on a clock that tests turn."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

from deployments.files.folder import Folder
from deployments.files.store import FileStore
from deployments.files.uploads import Ticket, Uploads


class Clock:
    """The time, as far from now as a test wants it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


async def sent(data: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    """A body as a server hands it on."""
    for at in range(0, len(data), size):
        yield data[at : at + size]
    yield b""


async def begun(uploads: Uploads, name: str | None = "cat.png", keep_s: int | None = None) -> Ticket:
    return await uploads.begin(name, "image/png", keep_s)


async def parted(uploads: Uploads, ticket: Ticket, parts: dict[int, bytes]) -> dict[int, str]:
    """Part number → tag of what was sent."""
    return {number: await uploads.receive(ticket, number, sent(data)) for number, data in parts.items()}


async def uploaded(uploads: Uploads, data: bytes = b"x", keep_s: int | None = None) -> Ticket:
    """The ticket of a file that is there."""
    ticket = await begun(uploads, keep_s=keep_s)
    await uploads.complete(ticket, await parted(uploads, ticket, {1: data}))
    return ticket


def folder(files: FileStore) -> Path:
    """Where a store that has a folder keeps its files."""
    assert isinstance(files.place, Folder)
    return files.place.path
