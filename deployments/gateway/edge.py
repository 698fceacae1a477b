"""What Serve is told of a request in headers, which are not the caller's to set.

Serve takes a time limit, and whether to watch for the caller's leaving, from any request. Here they are
dropped: a limit would end a request in an answer that is not fal's. To learn early that a caller left, Serve
reads ahead of the application, into a queue without bounds: a body would pile up in memory whenever the
network is faster than the disk. For uploads that is turned off. Then a body is read when the application asks
for it, and TCP holds the sender back. Serve takes `middlewares` from the environment, see
`server.DEFAULT_ENVIRONMENT`; without it only the bound and the protection are lost.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.addresses import FILES

# Ray 2.60, serve/_private/constants.py
_READ_AHEAD = b"x-request-disconnect-disabled"
_OF_SERVE = (_READ_AHEAD, b"x-request-timeout-seconds")


class Edge:
    """Says of uploads that nobody need watch for their senders' leaving: their readers notice."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [each for each in scope["headers"] if each[0].lower() not in _OF_SERVE]
            if scope["method"] in ("PUT", "POST") and FILES in scope["path"]:
                headers.append((_READ_AHEAD, b"?1"))
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts around the application."""
    return [Middleware(Edge)]
