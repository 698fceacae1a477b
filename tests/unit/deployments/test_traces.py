"""What is told of a request's way, in this process alone."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from deployments import traces
from schemas.errors import InputError, InternalError, NotReady
from tests.support.collector import collecting

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE = PARENT[3:35]


HOSTILE = [
    [],
    [""],
    ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"],  # without flags
    ["00-00000000000000000000000000000000-b7ad6b7169203331-01"],
    ["00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01"],
    ["ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"],
    [PARENT.upper()],
    [f" {PARENT}"],
    [f"{PARENT}\n"],
    [f"{PARENT}-more"],
    [PARENT + "0" * 100_000],
    [PARENT.replace("0a", "0\u0660")],  # a digit of another script
    [PARENT, PARENT],
    [f"{PARENT},{PARENT}"],
]


@pytest.mark.parametrize("headers", HOSTILE, ids=range(len(HOSTILE)))
def test_a_traceparent_that_is_none_is_not_gone_on_with(headers: list[str]) -> None:
    assert traces.continued(headers) is None


def test_a_callers_trace_is_gone_on_with(spans: InMemorySpanExporter) -> None:
    parent = traces.continued([PARENT])
    assert parent == PARENT
    with traces.span("submit", parent, {"darkroom.model": "flux"}, "SERVER") as span:
        assert traces.trace_id(span.traceparent) == TRACE
    [told] = spans.get_finished_spans()
    assert told.context is not None and told.parent is not None
    assert f"{told.context.span_id:016x}" == span.headers["traceparent"].split("-")[2]
    assert (f"{told.parent.trace_id:032x}", f"{told.parent.span_id:016x}") == (TRACE, "b7ad6b7169203331")
    assert told.attributes == {"darkroom.model": "flux"}


def test_a_caller_that_does_not_want_to_be_traced_is_not(spans: InMemorySpanExporter) -> None:
    with traces.span("submit", f"{PARENT[:-2]}00", {}) as span:
        span.child("fetch", 1.0)
    assert span.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert span.headers["traceparent"].endswith("-00")
    assert spans.get_finished_spans() == ()


def test_what_has_no_caller_begins_a_trace_of_its_own(spans: InMemorySpanExporter) -> None:
    ids = set()
    for _ in range(2):
        with traces.span("submit", None, {}) as span:
            ids.add(traces.trace_id(span.traceparent))
    assert len(ids) == 2
    assert [told.parent for told in spans.get_finished_spans()] == [None, None]


def test_nothing_is_told_without_a_collector_and_the_callers_word_is_handed_on() -> None:
    for parent in (None, PARENT):
        with traces.span("submit", parent, {"darkroom.model": "flux"}, waited_s=1) as span:
            span.child("fetch", 1.0, [("step 1/1", 1.0)])
            span.set({"darkroom.model": "flux"})
            span.answered(500, "internal_error")
            span.received(None, "nobody")
            span.failed(ValueError())
        assert span.traceparent == parent
    assert span.headers == {"traceparent": PARENT}


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
WISHES = [
    ({}, False),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    (ENDPOINT, True),
    ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
    ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://collector:4318/v1/metrics"}, False),
    (ENDPOINT | {"OTEL_SDK_DISABLED": "TRUE"}, False),
    (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
    (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False),
    (
        ENDPOINT
        | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
        True,
    ),
]


@pytest.mark.parametrize(("environment", "is_wanted"), WISHES, ids=range(len(WISHES)))
def test_the_environment_says_whether_there_is_a_collector(
    environment: dict[str, str], is_wanted: bool
) -> None:
    assert traces.is_wanted(environment) is is_wanted


def test_another_protocol_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    traces.is_wanted(ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert "http/protobuf only, not grpc" in caplog.text


def test_the_wait_is_told_as_a_span_before(spans: InMemorySpanExporter) -> None:
    with traces.span("dispatch", PARENT, {}, waited_s=7.0):
        pass
    waited, dispatched = spans.get_finished_spans()
    assert (waited.name, dispatched.name) == ("queue", "dispatch")
    assert waited.parent is not None and dispatched.parent is not None
    assert waited.parent.span_id == dispatched.parent.span_id
    assert waited.start_time is not None and waited.end_time is not None
    assert (waited.end_time - waited.start_time) / 1e9 == pytest.approx(7.0, abs=1e-6)
    assert waited.end_time == dispatched.start_time


def test_parts_end_when_they_are_told_and_their_events_are_bounded(spans: InMemorySpanExporter) -> None:
    with traces.span("generate", None, {}) as span:
        span.child("denoise", 2.0, [(f"step {step}/1000", 1.0 + step) for step in range(1, 1001)])
    part, whole = spans.get_finished_spans()
    assert part.parent is not None and whole.context is not None
    assert part.parent.span_id == whole.context.span_id
    assert part.start_time is not None and part.end_time is not None
    assert (part.end_time - part.start_time) / 1e9 == pytest.approx(2.0, abs=1e-6)
    assert len(part.events) == 128
    assert (part.events[-1].name, part.events[-1].timestamp) == ("step 1000/1000", 1_001_000_000_000)


FAILURES = [
    (InputError([]), StatusCode.UNSET, InputError.error_type, 422),  # the caller's own mistake
    (InternalError("why"), StatusCode.ERROR, InternalError.error_type, 500),
    (asyncio.CancelledError(), StatusCode.UNSET, "cancelled", None),
    (ZeroDivisionError("prompt"), StatusCode.ERROR, "ZeroDivisionError", None),
]


@pytest.mark.parametrize(("error", "code", "error_type", "status"), FAILURES, ids=range(len(FAILURES)))
def test_what_is_raised_is_told_by_its_kind_and_raised_on(
    spans: InMemorySpanExporter, error: BaseException, code: StatusCode, error_type: str, status: int | None
) -> None:
    with pytest.raises(type(error)), traces.span("submit", None, {}):
        raise error
    [told] = spans.get_finished_spans()
    assert told.status.status_code is code
    assert told.status.description is None
    expected = {"error.type": error_type} | ({"http.response.status_code": status} if status else {})
    assert told.attributes == expected
    assert told.events == ()  # no message and no traceback: they may have a prompt in them


def test_nothing_is_told_of_what_was_not_ready(spans: InMemorySpanExporter) -> None:
    with pytest.raises(NotReady), traces.span("dispatch", None, {}, waited_s=1.0):
        raise NotReady("nobody there")
    assert spans.get_finished_spans() == ()


def test_another_servers_answer_is_an_error_unless_it_took_it(spans: InMemorySpanExporter) -> None:
    for status, error in [(204, None), (301, None), (500, None), (None, "silence")]:
        with traces.span("POST", None, {}, "CLIENT") as span:
            span.received(status, error)
    told = [(each.status.status_code, each.attributes) for each in spans.get_finished_spans()]
    assert told == [
        (StatusCode.UNSET, {"http.response.status_code": 204}),
        (StatusCode.ERROR, {"http.response.status_code": 301, "error.type": "301"}),
        (StatusCode.ERROR, {"http.response.status_code": 500, "error.type": "500"}),
        (StatusCode.ERROR, {"error.type": "silence"}),
    ]


class Stuck(SpanExporter):
    """A collector that takes a connection and says nothing."""

    def __init__(self) -> None:
        self.asked, self.freed = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.freed.wait()
        return SpanExportResult.FAILURE


def test_nobody_waits_for_a_collector_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = Stuck()
    processor = BatchSpanProcessor(exporter, 100, schedule_delay_millis=1, max_export_batch_size=1)
    traces.send_to(processor, "worker")
    try:
        for _ in range(1000):  # ten times what is kept for it
            with traces.span("generate", None, {}):
                pass
        assert exporter.asked.wait(60)
        monkeypatch.setattr(traces, "CLOSE_S", 0.01)
        traces.close()
        assert not exporter.freed.is_set()
    finally:
        exporter.freed.set()


def test_spans_reach_a_collector_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        traces.start("worker")
        with traces.span("generate", PARENT, {"darkroom.attempt": 2}):
            pass
        traces.close()  # sends what is left
        [told] = collector.trace(TRACE, bool)
    assert (told.service, told.name, told.parent_id) == ("darkroom-worker", "generate", "b7ad6b7169203331")
    assert told.attributes == {"darkroom.attempt": 2}
    assert b"deployment.environment.name" in collector.raw[0]


def test_the_operators_name_for_the_service_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    traces.send_to(SimpleSpanProcessor(exporter), "gateway")
    with traces.span("submit", None, {}):
        pass
    traces.close()
    [told] = exporter.get_finished_spans()
    assert told.resource.attributes["service.name"] == "pictures"
    assert told.resource.attributes["service.namespace"] == "darkroom"
