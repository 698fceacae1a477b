"""A request's way through the processes, told as one trace to an OpenTelemetry collector.

A request's `traceparent` (https://www.w3.org/TR/trace-context/) is part of its job and of its row in the
queue, so that a retry, or a resume after a restart, goes on with the trace that its submit began. Nothing is
told unless OTEL_EXPORTER_OTLP_ENDPOINT names a collector; what OpenTelemetry's other variables say of
headers, certificates, sampling and limits holds as well.

A span says who, where and how long, never what: no prompts, no URLs, no keys.
"""

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from opentelemetry import trace
from opentelemetry.context import Context

from schemas.errors import DarkroomError, NotReady
from schemas.jobs import Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

logger = logging.getLogger(__name__)

Attributes = Mapping[str, str | int]
Moment = tuple[str, float]  # what happened, and when: seconds since the epoch
Kind = Literal["INTERNAL", "SERVER", "CLIENT", "CONSUMER"]

# Of version 00, and neither id may be all zeros. Later versions begin alike, but no one sends them.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_SAMPLED = 1

CLOSE_S = 5.0

_provider: "TracerProvider | None" = None
_tracer: trace.Tracer | None = None


def start(room: str) -> None:
    """Have this process's spans sent to the collector of the environment, if it names one.

    They are sent by a thread of its own, from a queue with bounds: a collector that is down costs spans, and
    no request its time.
    """
    if not is_wanted(os.environ):
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    send_to(BatchSpanProcessor(OTLPSpanExporter()), room)


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's variables ask for traces, in the one protocol that is spoken here."""

    def of_traces(name: str) -> str:
        return (
            environment.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}")
            or environment.get(f"OTEL_EXPORTER_OTLP_{name}")
            or ""
        )

    is_off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_off or environment.get("OTEL_TRACES_EXPORTER") == "none" or not of_traces("ENDPOINT"):
        return False
    if of_traces("PROTOCOL") not in ("", "http/protobuf"):
        logger.warning(
            "no traces are sent: OTLP is spoken as http/protobuf only, not %s", of_traces("PROTOCOL")
        )
        return False
    return True


def send_to(processor: "SpanProcessor", room: str) -> None:
    """Have every span of this process given to `processor`, as one of the service `darkroom-ROOM`, unless
    OTEL_SERVICE_NAME says otherwise."""
    global _provider, _tracer
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider

    ours = {"service.namespace": "darkroom", "service.name": f"darkroom-{room}"}
    resource = Resource.create(ours).merge(OTELResourceDetector().detect())
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(processor)
    _tracer = _provider.get_tracer("darkroom")


def close() -> None:
    """Send what is left, and tell no more. Waits for the collector up to CLOSE_S."""
    global _provider, _tracer
    provider, _provider, _tracer = _provider, None, None
    if provider is not None:
        closing = threading.Thread(target=provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def continued(headers: Sequence[str]) -> str | None:
    """What to go on with: a caller's `traceparent`, if it sent one, and that is well formed."""
    return headers[0] if len(headers) == 1 and _TRACEPARENT.fullmatch(headers[0]) else None


def trace_id(traceparent: str | None) -> str | None:
    """32 hexadecimal digits."""
    return None if traceparent is None else traceparent[3:35]


def of(job: Job) -> dict[str, str]:
    """What every span says of its request."""
    return {
        "darkroom.request.id": job.request_id,
        "darkroom.model": job.model,
        "darkroom.priority": job.priority.name.lower(),
        "gen_ai.request.model": job.endpoint_id,
    }


class Span:
    """A piece of a request's way. Use `span`.

    `traceparent` is what comes next goes on with: this span, or, where nothing is collected, what came.
    """

    def __init__(
        self, name: str, parent: str | None, attributes: Attributes, kind: Kind, begin_s: float
    ) -> None:
        """`begin_s`: seconds since the epoch."""
        self.traceparent = parent
        self._ours: trace.Span | None = None
        if _tracer is not None:
            self._ours = _tracer.start_span(
                name,
                _context(parent),
                trace.SpanKind[kind],
                attributes,
                start_time=_nanoseconds(begin_s),
            )
            self.traceparent = _written(self._ours.get_span_context())

    @property
    def headers(self) -> dict[str, str]:
        """What tells another server of it."""
        return {} if self.traceparent is None else {"traceparent": self.traceparent}

    def set(self, attributes: Attributes) -> None:
        if self._ours is not None:
            self._ours.set_attributes(attributes)

    def answered(self, status: int, error_type: str | None) -> None:
        """It came to an HTTP status. As with any server, a caller's own mistake is no error of the span."""
        if self._ours is not None:
            self._ours.set_attribute("http.response.status_code", status)
            if error_type is not None:
                self._fail(error_type, is_ours=status >= 500)

    def received(self, status: int | None, error: str | None) -> None:
        """It came to another server's answer, or to none."""
        if self._ours is not None:
            if status is not None:
                self._ours.set_attribute("http.response.status_code", status)
            if status is None or not 200 <= status < 300:
                self._fail(error or str(status), is_ours=True)

    def failed(self, error: BaseException) -> None:
        """It came to nothing."""
        if isinstance(error, DarkroomError):
            self.answered(error.status, error.error_type)
        elif isinstance(error, asyncio.CancelledError):
            self._fail("cancelled", is_ours=False)
        else:
            self._fail(type(error).__name__, is_ours=True)

    def child(self, name: str, seconds: float, moments: Sequence[Moment] = ()) -> None:
        """A part of it that has ended just now."""
        if self._ours is not None:
            now = time.time()
            part = Span(name, self.traceparent, {}, "INTERNAL", now - seconds)
            part._note(moments)
            part.end(now)

    def end(self, end_s: float) -> None:
        """Tell it. One that is not ended is never told."""
        if self._ours is not None:
            self._ours.end(_nanoseconds(end_s))

    def _note(self, moments: Sequence[Moment]) -> None:
        if self._ours is not None:
            for name, at_s in moments:
                self._ours.add_event(name, timestamp=_nanoseconds(at_s))

    def _fail(self, error_type: str, *, is_ours: bool) -> None:
        if self._ours is not None:
            self._ours.set_attribute("error.type", error_type)
            if is_ours:
                self._ours.set_status(trace.StatusCode.ERROR)


@contextmanager
def span(
    name: str,
    parent: str | None,
    attributes: Attributes,
    kind: Kind = "INTERNAL",
    *,
    waited_s: float = 0.0,
) -> Iterator[Span]:
    """A span for as long as it takes; what is raised is told, and raised on.

    Of what was not ready to begin nothing is told. `waited_s`: before it began, told as a span `queue`.
    """
    begin_s = time.time()
    waiting = Span("queue", parent, attributes, "INTERNAL", begin_s - waited_s) if waited_s else None
    current = Span(name, parent, attributes, kind, begin_s)
    try:
        yield current
    except NotReady:
        raise
    except BaseException as error:
        current.failed(error)
        _end(waiting, begin_s)
        _end(current, time.time())
        raise
    else:
        _end(waiting, begin_s)
        _end(current, time.time())


def _end(span: Span | None, end_s: float) -> None:
    if span is not None:
        span.end(end_s)


def _context(traceparent: str | None) -> Context:
    """Of a span in another process, or of none: never of what else runs in this one."""
    if traceparent is None:
        return Context()
    _, trace_id, span_id, flags = traceparent.split("-")
    parent = trace.SpanContext(
        int(trace_id, 16), int(span_id, 16), True, trace.TraceFlags(int(flags, 16) & _SAMPLED)
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context())


def _written(context: trace.SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags) & _SAMPLED:02x}"


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
