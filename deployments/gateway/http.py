"""The gateway over HTTP: Starlette routes that translate, and do nothing else."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from deployments.gateway import (
    answers,
    attendance,
    authentication,
    body,
    downloads,
    history,
    middleware,
    models,
    openai,
    pages,
    realtime,
    sse,
    tokens,
    uploads,
    wishes,
)
from deployments.gateway.abandoned import abandon, while_connected
from deployments.gateway.addresses import JWKS, METHODS, Verb, queue_path
from deployments.gateway.attendance import Attendance
from deployments.gateway.gateway import Accepted, Caller, Gateway
from deployments.gateway.keep_alive import KeptAlive
from deployments.gateway.keys import Keys
from deployments.gateway.patience import Patience
from schemas.errors import BadRequest, MethodNotAllowed, NotFound, NotReady
from schemas.jobs import JobResult, Previewed, Record, Snapshot

GRACE_S = 15.0  # a stream's answer begins after so long at the latest, with or without an event

JWKS_AGE_S = 3600  # how long a cache between us and a receiver of webhooks may keep our keys

Ready = Callable[[], Awaitable[bool]]


def build(gateway: Gateway, keys: Keys, ready: Ready, jwks: Callable[[], dict[str, Any]]) -> ASGIApp:
    """The ASGI application. `ready` tells whether every model can take a request, `jwks` by which keys
    webhooks are verified."""
    present = Attendance(gateway, gateway.settings.linger_s)
    http = _Http(gateway, present, ready, jwks)
    everything = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
    routes = [
        Route("/", http.about),
        Route("/health", http.health),
        Route("/ready", http.ready),
        *pages.routes(gateway),
        *downloads.routes(gateway.files),
        *uploads.routes(gateway, keys),
        *models.routes(gateway),
        *tokens.routes(keys),
        *realtime.routes(gateway, keys),
        *openai.routes(gateway, present),
        *history.routes(gateway),
        Route("/run/{path:path}", http.run, methods=everything),
        Route("/queue/{path:path}", http.queue, methods=everything),
        Route(JWKS, http.jwks),
        Route("/rest/{path:path}", http.unknown, methods=everything),
        Route("/cdn/{path:path}", http.unknown, methods=everything),
    ]
    settings = gateway.settings
    app: ASGIApp = Router(routes=routes, redirect_slashes=False)
    for layer in (
        lambda inner: middleware.Turnstile(inner, gateway.settings.max_runs),
        middleware.Addressing,
        lambda inner: authentication.Authentication(inner, keys, settings.proxies),
        lambda inner: Patience(inner, settings.body_grace_s, settings.body_bytes_per_s),
        middleware.Errors,
        middleware.Headers,
    ):
        app = layer(app)
    return app


class _Http:
    def __init__(
        self, gateway: Gateway, present: Attendance, ready: Ready, jwks: Callable[[], dict[str, Any]]
    ) -> None:
        self._gateway = gateway
        self._attendance = present
        self._ready = ready
        self._jwks = jwks

    async def about(self, request: Request) -> Response:
        if pages.is_visit(request.scope):
            return RedirectResponse(pages.PATH.lstrip("/"), 307, {"vary": "accept, authorization"})
        return answers.Json({"name": "darkroom", "endpoints": sorted(self._gateway.endpoints)})

    async def health(self, request: Request) -> Response:
        return answers.Json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        if not await self._ready():
            raise NotReady("The models are still being loaded.")
        return answers.Json({"status": "ready"})

    async def jwks(self, request: Request) -> Response:
        return answers.Json(self._jwks(), 200, {"cache-control": f"public, max-age={JWKS_AGE_S}"})

    async def unknown(self, request: Request) -> Response:
        raise NotFound(f"Path {request.url.path} not found")

    async def queue(self, request: Request) -> Response:
        path = queue_path(request.path_params["path"])
        if request.method not in METHODS[path.verb]:
            raise MethodNotAllowed(f"Use {' or '.join(METHODS[path.verb])} here.")
        if path.verb == Verb.SUBMIT:
            return await self._enqueue(request, path.app)
        caller = self._caller(request)
        record = await self._gateway.record(path.app, path.request_id, caller.tenant)
        answer = {
            Verb.STATUS: self._status,
            Verb.STATUS_STREAM: self._status_stream,
            Verb.RESULT: self._result,
            Verb.CANCEL: self._cancel,
        }[path.verb]
        return await answer(request, caller, record)

    async def _enqueue(self, request: Request, endpoint_id: str) -> Response:
        fields = await self._fields(request)
        call = attendance.call("queue", request, endpoint_id, fields)
        accepted = self._attendance.returning(call)
        accepted = accepted or await self._submit(
            request, endpoint_id, fields, previews=wishes.wants_previews(request)
        )
        if await request.is_disconnected():
            self._attendance.missed(call, accepted, cancels=False)
        return answers.receipt(accepted.job, accepted.receipt, accepted.ignored)

    async def _status(self, request: Request, caller: Caller, record: Record) -> Response:
        request_id = record.job.request_id
        logs = await self._gateway.logs(request_id) if _wants(request, "logs") else None
        status = answers.status(record, logs, caller.base_url)
        return answers.Json(status, answers.status_code(record), {answers.REQUEST_ID: request_id})

    async def _status_stream(self, request: Request, caller: Caller, record: Record) -> Response:
        """A status document per change; its logs are those since the one before, its preview the newest."""
        snapshots = self._gateway.watch(record.job.request_id, caller.tenant)
        wants_logs, wants_previews = _wants(request, "logs"), _wants(request, "previews")

        def document(each: Snapshot) -> dict[str, Any]:
            status = answers.status(each.record, each.events if wants_logs else None, caller.base_url)
            return status | (answers.preview(each.events) if wants_previews else {})

        documents = (document(each) async for each in snapshots)
        return sse.EventStream(documents, {answers.REQUEST_ID: record.job.request_id})

    async def _result(self, request: Request, caller: Caller, record: Record) -> Response:
        if record.result is None:
            raise BadRequest("Request is still in progress")
        return answers.result(record.result, record.job.request_id)

    async def _cancel(self, request: Request, caller: Caller, record: Record) -> Response:
        outcome = await self._gateway.cancel(record.job.request_id, caller.tenant, caller.actor)
        return answers.cancelled(outcome, record.job.request_id)

    async def run(self, request: Request) -> Response:
        if request.method not in METHODS[Verb.SUBMIT]:
            raise MethodNotAllowed("Use POST here.")
        path = request.path_params["path"].strip("/")
        endpoint_id = path.removesuffix("/stream")
        if endpoint_id != path and path not in self._gateway.endpoints:
            return await self._stream(request, endpoint_id)
        fields = await self._fields(request)
        call = attendance.call("run", request, path, fields)
        accepted = self._attendance.returning(call)
        accepted = accepted or await self._submit(request, path, fields, waits=True)
        request_id = accepted.job.request_id
        headers = {answers.REQUEST_ID: request_id, **answers.ignored_header(accepted.ignored)}
        with self._attendance.visit(call, accepted) as visit:
            waiting = asyncio.wait([visit.result], timeout=self._gateway.settings.run_grace_s)
            if await while_connected(request.receive, waiting) is None:
                return Response(status_code=499)  # nobody reads it
            if not visit.result.done():
                return KeptAlive(visit, headers)
            answer = answers.result(visit.result.result(), request_id)
            answer.headers.update(headers)
            visit.is_served = True
            return answer

    async def _stream(self, request: Request, endpoint_id: str) -> Response:
        """Previews as server-sent events, the output as the last one. An error before the first
        event is an ordinary answer; a later one is an event with `error`."""
        fields = await self._fields(request)
        accepted = await self._submit(request, endpoint_id, fields, previews=True, waits=True)
        job = accepted.job
        events = _outputs(self._gateway.watch(job.request_id, job.tenant))
        first = asyncio.ensure_future(anext(events))
        waiting = asyncio.wait([first], timeout=GRACE_S)
        has_left = True
        try:
            has_left = await while_connected(request.receive, waiting) is None
        finally:
            if has_left:
                first.cancel()
                abandon(self._gateway, job)
        if has_left:
            return Response(status_code=499)
        event = first.result() if first.done() else None
        if isinstance(event, JobResult) and event.error is not None:
            return answers.result(event, job.request_id)
        headers = {answers.REQUEST_ID: job.request_id, **answers.ignored_header(accepted.ignored)}
        ended = asyncio.Event()

        async def documents() -> AsyncIterator[dict[str, Any]]:
            event: Previewed | JobResult | None = await first
            while event is not None:
                if isinstance(event, JobResult):
                    ended.set()
                yield _document(event)
                event = await anext(events, None)

        def closed() -> None:
            first.cancel()
            if not ended.is_set():
                abandon(self._gateway, job)

        return sse.EventStream(documents(), headers, closed)

    async def _fields(self, request: Request) -> dict[str, Any]:
        """A call's input: its body, or the query of a GET."""
        if request.method == "GET":
            query = request.query_params.items()
            fields: dict[str, Any] = {k: v for k, v in query if not k.startswith("fal_")}
            body.check(fields)
            return fields
        limit = self._gateway.settings.max_body_bytes
        declared = request.headers.get("content-length")
        return body.parse(await body.read(request.stream(), declared, limit))

    async def _submit(
        self,
        request: Request,
        endpoint_id: str,
        fields: dict[str, Any],
        *,
        previews: bool = False,
        waits: bool = False,
    ) -> Accepted:
        asked = wishes.read(request, previews=previews, waits=waits)
        return await self._gateway.submit(endpoint_id, fields, self._caller(request), asked)

    def _caller(self, request: Request) -> Caller:
        return Caller(request.state.actor, self._gateway.settings.public_url or wishes.base_url(request))


def _wants(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("1", "true")


async def _outputs(snapshots: AsyncIterator[Snapshot]) -> AsyncIterator[Previewed | JobResult]:
    """The previews of a job and then its result."""
    async for snapshot in snapshots:
        for each in snapshot.events:
            if isinstance(each.event, Previewed):
                yield each.event
        if snapshot.record.result is not None:
            yield snapshot.record.result


def _document(event: Previewed | JobResult) -> dict[str, Any]:
    if isinstance(event, Previewed):
        return event.output
    return event.body if event.error is None else {"error": event.body}
