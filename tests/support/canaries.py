"""Secrets that go through a server and are looked for in all that it tells and leaves."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import logs


def secrets_of(keys: str) -> list[str]:
    """Of keys as DARKROOM_KEYS has them."""
    return [key.partition(":")[2] for key in keys.split()]


def leaks(secrets: Iterable[str], places: Iterable[Path]) -> list[str]:
    """The secrets in files below the folders, but for files that are secret by their purpose: keys that sign,
    below `*keys/`, and `secret`."""
    files = (path for place in places for path in sorted(place.rglob("*")) if path.is_file())
    looked_at = {path: path.read_bytes() for path in files if not _is_secret_itself(path)}
    return [
        f"{each} in {path}" for each in secrets for path, data in looked_at.items() if each.encode() in data
    ]


def _is_secret_itself(path: Path) -> bool:
    return path.name == "secret" or any(part.endswith("keys") for part in path.parts)


class Lookout(logging.Handler):
    """Sees what an application logs and answers; `heard` is what had a secret in it."""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        self.heard: list[str] = []
        self._secrets = tuple(secrets)
        self._forms = (logs.Plain(logging.Formatter("%(levelname)s %(message)s")), logs.Json())

    def emit(self, record: logging.LogRecord) -> None:
        for form in self._forms:
            self._hear(form.format(record))

    def watching(self, app: ASGIApp) -> ASGIApp:
        """The application; each part of its answers and each line of a websocket is looked at."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            async def tell(message: Message) -> None:
                self._hear(str(message))
                await send(message)

            await app(scope, receive, tell)

        return watched

    def _hear(self, text: str) -> None:
        if any(secret in text for secret in self._secrets):
            self.heard.append(text)


@contextmanager
def lookout(secrets: Iterable[str]) -> Iterator[Lookout]:
    """One that hears the server's log in this process, until the end of the block."""
    root, handler = logging.getLogger("deployments"), Lookout(secrets)
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
