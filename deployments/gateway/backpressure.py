"""Lets an upload come no faster than it is stored.

To learn early that a caller left, Serve reads ahead of the application, into a queue without bounds: a
body would pile up in memory whenever the network is faster than the disk. A request header turns that
off. Then a body is read when the application asks for it, and TCP holds the sender back. Serve takes
`middlewares` from the environment, see `server.DEFAULT_ENVIRONMENT`; without it only the bound is lost.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.addresses import FILES

_READ_AHEAD = b"x-request-disconnect-disabled"  # Ray 2.60, serve/_private/constants.py


class Backpressure:
    """Says of uploads that nobody need watch for their senders' leaving: their readers notice."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("PUT", "POST") and FILES in scope["path"]:
            scope = {**scope, "headers": [*scope["headers"], (_READ_AHEAD, b"?1")]}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts around the application."""
    return [Middleware(Backpressure)]
