"""A collector of traces: OpenTelemetry's protocol over HTTP, as far as its exporter speaks it."""

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent

PATIENCE_S = 60.0  # a test that waits longer has failed


@dataclass(frozen=True)
class Told:
    """A span as it came."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    begin_ns: int
    end_ns: int
    is_error: bool
    attributes: dict[str, str | int]
    events: tuple[str, ...]


@dataclass
class Collector:
    """What it was sent, by whoever knows its address."""

    url: str = ""
    raw: list[bytes] = field(default_factory=list)
    _spans: list[Told] = field(default_factory=list)
    _came: threading.Condition = field(default_factory=threading.Condition)

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        spans = [
            _told(str(_value(resource.resource.attributes, "service.name")), span)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._came:
            self.raw.append(body)
            self._spans += spans
            self._came.notify_all()

    def trace(self, trace_id: str, is_whole: Callable[[list[Told]], bool]) -> list[Told]:
        """The spans of a trace by their begin, once there are all that are waited for."""
        return self._those(lambda span: span.trace_id == trace_id, is_whole)

    def request(self, request_id: str, is_whole: Callable[[list[Told]], bool]) -> list[Told]:
        """The same of the spans that name a request."""
        return self._those(lambda span: span.attributes.get("darkroom.request.id") == request_id, is_whole)

    def _those(
        self, are_wanted: Callable[[Told], bool], is_whole: Callable[[list[Told]], bool]
    ) -> list[Told]:
        def known() -> list[Told]:
            return sorted(filter(are_wanted, self._spans), key=lambda span: (span.begin_ns, span.end_ns))

        with self._came:
            assert self._came.wait_for(lambda: is_whole(known()), PATIENCE_S), known()
            return known()


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on this machine, until the block ends."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            collector.take(body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        collector.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            http.shutdown()
            thread.join()


def _told(service: str, span: Sent) -> Told:
    return Told(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        begin_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        is_error=span.status.code == span.status.STATUS_CODE_ERROR,
        attributes={each.key: _plain(each.value) for each in span.attributes},
        events=tuple(event.name for event in span.events),
    )


def _value(attributes: object, key: str) -> str | int:
    [value] = [each.value for each in attributes if each.key == key]  # type: ignore[attr-defined]
    return _plain(value)


def _plain(value: AnyValue) -> str | int:
    return value.string_value if value.HasField("string_value") else int(value.int_value)
