"""The layers around the routes, outermost last: plain ASGI callables."""

import logging
from collections import Counter
from uuid import uuid4

from starlette.datastructures import Headers as HeaderView
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from deployments import logs, metrics
from deployments.gateway import answers, openai
from deployments.gateway.addresses import canonical
from schemas.errors import (
    BadRequest,
    DarkroomError,
    InternalError,
    MethodNotAllowed,
    NotFound,
    RequestError,
    StoreDown,
    TooManyRuns,
)

logger = logging.getLogger(__name__)

RUN_PREFIXES = ("/run/", openai.PREFIX)  # where a caller waits for its pictures

_EXPOSED = (
    "x-fal-request-id, x-fal-request-timeout-type, x-fal-error-type, x-fal-retryable, x-fal-needs-retry, "
    "x-fal-billable-units, x-darkroom-ignored-fields, x-darkroom-priority, idempotent-replayed, "
    "x-should-retry, retry-after, etag, accept-ranges, content-range, content-disposition"
)


class Turnstile:
    """Bounds the calls that a key waits for at once. Lies within `Addressing` and `Authentication`."""

    def __init__(self, app: ASGIApp, limit: int | None) -> None:
        self._app = app
        self._limit = limit
        self._inside: Counter[str] = Counter()  # calls, by tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_run = scope["type"] == "http" and scope["path"].startswith(RUN_PREFIXES)
        if self._limit is None or not is_run:
            await self._app(scope, receive, send)
            return
        tenant = scope["state"]["tenant"]
        if self._inside[tenant] >= self._limit:
            raise TooManyRuns(f"At most {self._limit} runs of one key at once; the queue takes more.")
        self._inside[tenant] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside[tenant] -= 1


class Addressing:
    """Brings every way of addressing a service to the prefixed path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            query = scope["query_string"].decode("latin-1")
            address = canonical(scope["path"], query, HeaderView(scope=scope))
            path, query_string = address.path, address.query.encode("latin-1", "replace")
            raw = (path == scope["path"] and scope.get("raw_path")) or path.encode()
            scope = {**scope, "path": path, "raw_path": raw, "query_string": query_string}
        await self._app(scope, receive, send)


class Errors:
    """Turns what is raised into fal's shapes. Here a fault of ours is logged, once.

    A websocket is refused without a word, unless its route has taken it: then that has told.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            try:
                await self._app(scope, receive, send)
            except RequestError:
                await WebSocketClose()(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self  # makes Starlette's routes raise rather than answer in plain text
        began = False

        async def watch(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            known = _known(error, scope)
            path = scope["path"].partition("/multipart/")[0]  # what follows is a ticket
            if isinstance(error, StoreDown):
                logger.error("%s %s failed, %s: %s", scope["method"], path, _id(scope), logs.why(error))
            elif known.status >= 500 and not isinstance(error, DarkroomError):
                logger.exception("%s %s failed, %s", scope["method"], path, _id(scope))
            metrics.REFUSED.add(reason=known.error_type, status=str(known.status))
            if began:
                raise
            told = openai.failure if scope["path"].startswith(openai.PREFIX) else answers.failure
            await told(known)(scope, receive, send)


class Headers:
    """Answers preflights, and puts the request id and CORS headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["call_id"] = str(uuid4())

        async def decorate(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault(answers.REQUEST_ID, _id(scope))
                headers["access-control-allow-origin"] = "*"
                headers["access-control-expose-headers"] = _EXPOSED
            await send(message)

        if scope["method"] == "OPTIONS":
            await _preflight(scope)(scope, receive, decorate)
        else:
            await self._app(scope, receive, decorate)


def _preflight(scope: Scope) -> answers.Json:
    """ "*" does not cover Authorization, so what is asked for is echoed. A page from the internet may use a
    server in the browser's own network: what it needs is a key, not a place."""
    headers = HeaderView(scope=scope)
    asked = headers.get("access-control-request-headers", "authorization")
    allowed = {
        "access-control-allow-methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
        "access-control-allow-headers": asked,
        "access-control-max-age": "600",
    }
    if headers.get("access-control-request-private-network") == "true":
        allowed["access-control-allow-private-network"] = "true"
    return answers.Json({}, 200, allowed)


def _known(error: Exception, scope: Scope) -> DarkroomError:
    if isinstance(error, DarkroomError):
        return error
    if isinstance(error, ClientDisconnect):
        return BadRequest("The connection was closed before the body was whole.")
    if isinstance(error, HTTPException):
        kinds: dict[int, type[RequestError]] = {404: NotFound, 405: MethodNotAllowed}
        return kinds.get(error.status_code, BadRequest)(error.detail)
    return InternalError(f"Internal server error. The server's log says why, under {_id(scope)}.")


def _id(scope: Scope) -> str:
    call_id: str = scope["state"]["call_id"]
    return call_id
