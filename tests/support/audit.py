"""What this process opens, connects to and looks up, as Python's own audit hooks tell it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """In the order in which it happened."""

    opened: list[str] = field(default_factory=list)
    connected: list[Any] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)


_seen: Seen | None = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open" and not isinstance(args[0], int):
        _seen.opened.append(os.fsdecode(args[0]))
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.symlink", "os.link", "os.rmdir"):
        _seen.opened += [
            os.fsdecode(each) for each in args[:2] if isinstance(each, str | bytes | os.PathLike)
        ]
    elif event in ("socket.connect", "socket.sendto"):
        _seen.connected.append(args[1])
    elif event == "socket.getaddrinfo":
        _seen.looked_up.append(str(args[0]))


sys.addaudithook(_note)


@contextmanager
def watching() -> Iterator[Seen]:
    """Watch until the end of the block. Hooks cannot be taken away: outside of it they do nothing."""
    global _seen
    _seen = seen = Seen()
    try:
        yield seen
    finally:
        _seen = None
