"""The gateway's verbs, without HTTP: check a request, accept it, follow it.

Run, stream and Python callers are the same job as a queued one, with somebody waiting on it.
"""

import hashlib
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from deployments import logs, metrics, traces
from deployments.files.guard import Guard
from deployments.files.store import FileStore
from deployments.files.uploads import Uploads
from deployments.gateway import inline, validation
from deployments.gateway.addresses import application, belongs
from deployments.gateway.keys import ANYONE
from deployments.queue import Queue
from pipelines import registry
from schemas.access import Actor
from schemas.deliveries import MAX_URL_BYTES
from schemas.errors import AssetError, BadRequest, InternalError, NotFound, RequestNotFound
from schemas.fields import EndpointInput
from schemas.jobs import (
    CancelOutcome,
    Event,
    Job,
    JobResult,
    Logged,
    Once,
    Priority,
    Receipt,
    Record,
    Snapshot,
)
from schemas.settings import Catalogue, FrontSettings, ModelEntry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and how it reaches this server."""

    actor: Actor = Actor(ANYONE)
    base_url: str = ""

    @property
    def tenant(self) -> str:
        return self.actor.tenant


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a caller may ask about the handling of a request, beside its input."""

    priority: Priority = Priority.NORMAL
    start_timeout_s: float | None = None
    webhook_url: str | None = None
    max_queue_length: int | None = None  # refuse when more wait
    keep_s: int | None = None  # how long the output's files are kept; None: as the settings say
    previews: bool = False
    waits: bool = False  # it is a run: the caller stays for the result
    max_retries: int | None = None  # after the loss of a worker; None: as often as the server will
    stores_io: bool = True  # keep input and output as long as any
    tags: tuple[str, ...] = ()
    idempotency_key: str | None = None  # what comes again under it is the same request
    traceparent: str | None = None  # the span of the caller's that it is part of


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that is on disk."""

    job: Job
    receipt: Receipt
    ignored: tuple[str, ...]  # fields sent that the endpoint does not know


class Gateway:
    """One per process. Everything that lasts is in the queue and the file store."""

    def __init__(self, queue: Queue, files: FileStore, settings: FrontSettings) -> None:
        self.files = files
        self.uploads = Uploads(files, settings.max_upload_bytes, settings.min_free_bytes)
        self.settings = settings
        self._queue = queue
        self._receivers = Guard(settings.webhooks)
        self._routes: Mapping[str, str] = {}
        self._models: Mapping[str, ModelEntry] = {}

    def configure(self, catalogue: Catalogue) -> None:
        """Serve this catalogue from now on.

        Raises KeyError for an endpoint that does not exist, ValueError for an example with a field of none.
        """
        for name, entry in catalogue.models.items():
            inputs = [registry.endpoint(endpoint_id).input_type() for endpoint_id in entry.endpoints]
            known = {field for each in inputs for field in each.model_fields}
            if unknown := (entry.example or {}).keys() - known:
                raise ValueError(
                    f"the example of {name} has fields of no endpoint: {', '.join(sorted(unknown))}"
                )
        self._routes, self._models = catalogue.routes(), catalogue.models

    @property
    def is_alive(self) -> bool:
        """Whether requests can still be accepted."""
        return self._queue.is_alive

    @property
    def endpoints(self) -> Mapping[str, str]:
        """Endpoint id → the model that serves it."""
        return self._routes

    def entry(self, endpoint_id: str) -> ModelEntry:
        """What the catalogue says of the model that serves an endpoint. Raises KeyError."""
        return self._models[self._routes[endpoint_id]]

    async def run(self, endpoint_id: str, request: EndpointInput | Mapping[str, Any]) -> Any:
        """For Python callers: the endpoint's Input, or its fields, in; its typed Output out.

        Goes through the queue like any other request. Raises the DarkroomError that an HTTP caller
        would see as a status and a body.
        """
        fields = request if isinstance(request, Mapping) else request.model_dump(mode="json")
        caller = Caller(base_url=self.settings.public_url or "")
        accepted = await self.submit(endpoint_id, fields, caller)
        result = await self.result(accepted.job.request_id, caller.tenant)
        return registry.endpoint(endpoint_id).schema().Output(**result.output())

    async def submit(
        self,
        endpoint_id: str,
        fields: Mapping[str, Any],
        caller: Caller,
        wishes: Wishes | None = None,
    ) -> Accepted:
        """Accept a request. When this returns it is on disk.

        Raises NotFound, InputError, StoreFull, BadRequest for a webhook to where none may go, and what
        Queue.submit raises for one request too many.
        """
        wishes = wishes or Wishes()
        known = {"gen_ai.request.model": endpoint_id} if endpoint_id in self._routes else {}
        with traces.span("submit", wishes.traceparent, known, "SERVER") as span:
            accepted = await self._accept(endpoint_id, fields, caller, wishes, span.traceparent)
            span.set(traces.of(accepted.job))
        return accepted

    async def _accept(
        self,
        endpoint_id: str,
        fields: Mapping[str, Any],
        caller: Caller,
        wishes: Wishes,
        traceparent: str | None,
    ) -> Accepted:
        self.files.check_room(self.settings.min_free_bytes)
        model = self._model_of(endpoint_id)
        kind = registry.endpoint(endpoint_id).input_type()
        request = validation.validate(kind, fields, self.settings.limits)
        ignored = tuple(validation.ignored(kind, fields))
        self._check_receiver(wishes.webhook_url)
        document = request.model_dump(mode="json", exclude_none=True)
        if caller.base_url:
            document = await inline.stored(request, document, self.files, caller.base_url, self.settings)
        job = Job(
            request_id=str(uuid4()),
            endpoint_id=endpoint_id,
            model=model,
            input=document,
            tenant=caller.tenant,
            base_url=caller.base_url,
            priority=max(wishes.priority, caller.actor.allowance.max_priority),
            start_timeout_s=wishes.start_timeout_s,
            webhook_url=wishes.webhook_url,
            previews=wishes.previews,
            max_retries=wishes.max_retries,
            stores_io=wishes.stores_io,
            tags=wishes.tags,
            keep_s=wishes.keep_s or self.settings.keep.files_s,
            traceparent=traceparent,
        )
        notes = [Logged(f"unknown field {name!r} was ignored", "WARN") for name in ignored]
        if job.priority != wishes.priority:
            notes.append(Logged(f"the key's highest priority is {job.priority.name.lower()}"))
        key = wishes.idempotency_key
        once = Once(key, fingerprint(endpoint_id, fields)) if key else None
        receipt = await self._queue.submit(
            job, notes, wishes.max_queue_length, once, caller.actor, waits=wishes.waits
        )
        if not receipt.replayed:
            metrics.ACCEPTED.add(model=model, priority=job.priority.name.lower())
        else:
            first = await self._queue.get(receipt.request_id, caller.tenant)
            job = first.job if first is not None else job
        with logs.about(job.request_id, traceparent):
            verb = "found" if receipt.replayed else "accepted"
            logger.info("%s %s for %s", verb, job.request_id, endpoint_id)
        return Accepted(job, receipt, ignored)

    async def recent(
        self, tenant: str, limit: int, before: int | None, endpoints: Sequence[str]
    ) -> list[tuple[int, Record]]:
        """See Queue.recent."""
        return await self._queue.recent(tenant, limit, before, endpoints)

    async def erase(self, request_id: str, actor: Actor) -> Record:
        """See Queue.erase. Raises NotFound and BadRequest."""
        record = await self._queue.erase(request_id, actor.tenant, actor)
        if record is None:
            raise RequestNotFound(f"Request {request_id} not found")
        return record

    async def record(self, app: str, request_id: str, tenant: str) -> Record:
        """A tenant's request under its application. Raises NotFound."""
        record = await self._queue.get(request_id, tenant)
        if record is None or not belongs(record.job.endpoint_id, app):
            raise RequestNotFound(f"Request {request_id} not found")
        return record

    async def logs(self, request_id: str) -> list[Event]:
        """All log lines of a request so far."""
        events = await self._queue.events(request_id)
        return [event for event in events if isinstance(event.event, Logged)]

    def watch(self, request_id: str, tenant: str) -> AsyncIterator[Snapshot]:
        """See Queue.watch."""
        return self._queue.watch(request_id, tenant)

    async def result(self, request_id: str, tenant: str) -> JobResult:
        """Wait for a request's result."""
        result = None
        async for snapshot in self.watch(request_id, tenant):
            result = snapshot.record.result
        if result is None:
            raise InternalError(f"Request {request_id} is no longer known.")
        return result

    async def cancel(self, request_id: str, tenant: str, by: Actor | None = None) -> CancelOutcome:
        """See Queue.cancel."""
        return await self._queue.cancel(request_id, tenant, by)

    def _check_receiver(self, url: str | None) -> None:
        """Refuse what can be told without a look-up; the sender checks what the host leads to."""
        if url is None:
            return
        if len(url.encode("utf-8", "surrogatepass")) > MAX_URL_BYTES:
            raise BadRequest(f"fal_webhook: a URL may have at most {MAX_URL_BYTES} bytes.")
        try:
            self._receivers.check_text(url)
        except AssetError as error:
            raise BadRequest(f"fal_webhook: {error.message}") from error

    def check(self, endpoint_id: str) -> None:
        """Raise NotFound for what is not served here."""
        self._model_of(endpoint_id)

    def _model_of(self, endpoint_id: str) -> str:
        if model := self._routes.get(endpoint_id):
            return model
        app = application(endpoint_id)
        if app in map(application, self._routes):
            path = endpoint_id.removeprefix(app)
            raise NotFound(f"Path {path or '/'} not found")
        raise NotFound(f'Application "{app}" not found')


def fingerprint(endpoint_id: str, fields: Mapping[str, Any]) -> str:
    """The same for the same call."""
    text = json.dumps([endpoint_id, fields], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
