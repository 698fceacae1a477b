"""One request followed through every process of a real server, as a collector of traces sees it."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx

from tests.clients.inputs import ALICE, ENDPOINT, REMAKE, SMALL
from tests.support.collector import Collector, Told
from tests.support.receivers import Receiver
from tests.support.server import Server
from tests.support.sites import serving
from tests.support.watching import follow

CALLER = "b7ad6b7169203331"  # the span of the caller's
STAGES = ["wait", "fetch", "adapters", "encode", "denoise", "decode", "upload"]


def submitted(http: httpx.Client, url: str, fields: Mapping[str, Any], traceparent: bytes) -> dict[str, Any]:
    answer = http.post(url, content=json.dumps(fields), headers=[(b"traceparent", traceparent)])
    receipt: dict[str, Any] = answer.raise_for_status().json()
    for status in follow(http, receipt):
        if status["status"] == "COMPLETED":
            break
    return receipt


def has(*names: str) -> Any:
    return lambda spans: {span.name for span in spans} >= set(names)


def test_a_request_is_one_trace_from_its_caller_to_its_webhook(
    alice: httpx.Client, collector: Collector, receiver: Receiver
) -> None:
    trace = uuid4().hex
    url = f"/queue/{ENDPOINT}?fal_webhook={quote(f'{receiver.url}/hook?ticket=hidden', safe='')}"
    receipt = submitted(alice, url, SMALL, f"00-{trace}-{CALLER}-01".encode())
    generated = f"generate_content {ENDPOINT}"
    ways = ["submit", "queue", "dispatch", generated, "POST"]
    told = collector.trace(trace, has(*ways, *STAGES))
    one: dict[str, Told] = {span.name: span for span in told}
    assert len(told) == len(one) == len(ways) + len(STAGES)

    assert one["submit"].parent_id == CALLER
    for name in ("queue", "dispatch", "POST"):
        assert one[name].parent_id == one["submit"].span_id
    assert one[generated].parent_id == one["dispatch"].span_id
    for name in STAGES:
        assert one[name].parent_id == one[generated].span_id
    rooms = {name: one[name].service.removeprefix("darkroom-") for name in ways}
    assert rooms == {
        "submit": "gateway",
        "queue": "dispatcher",
        "dispatch": "dispatcher",
        generated: "worker",
        "POST": "dispatcher",
    }

    # one after the other, on one machine's clock
    assert one["queue"].end_ns == one["dispatch"].begin_ns
    assert one["dispatch"].begin_ns <= one[generated].begin_ns
    assert [span.name for span in told if span.name in STAGES] == STAGES
    for earlier, later in zip(STAGES, STAGES[1:], strict=False):
        assert one[earlier].begin_ns <= one[earlier].end_ns <= one[later].end_ns
    assert one[generated].begin_ns <= one["fetch"].begin_ns
    assert one["upload"].end_ns <= one[generated].end_ns <= one["dispatch"].end_ns
    assert one["denoise"].events == ("step 1/3", "step 2/3", "step 3/3")

    about = {
        "darkroom.request.id": receipt["request_id"],
        "darkroom.model": "flux",
        "darkroom.priority": "normal",
        "gen_ai.request.model": ENDPOINT,
    }
    assert one["submit"].attributes == about
    assert one["queue"].attributes.items() >= about.items()
    assert one["dispatch"].attributes == {
        **about,
        "darkroom.attempt": 1,
        "darkroom.fence": 1,
        "http.response.status_code": 200,
    }
    assert one[generated].attributes.items() >= about.items()
    assert one["POST"].attributes["http.response.status_code"] == 200
    assert receiver.next().headers["traceparent"] == f"00-{trace}-{one['POST'].span_id}-01"
    assert not any(span.is_error for span in told)


def test_a_hostile_traceparent_is_not_gone_on_with(alice: httpx.Client, collector: Collector) -> None:
    zero = "0" * 32
    hostile = [f"00-{zero}-{CALLER}-01".encode(), b"x" * 4000, b"00-\xff", b""]
    receipts = [
        submitted(alice, f"/queue/{ENDPOINT}", SMALL | {"seed": seed}, value)
        for seed, value in enumerate(hostile, start=100)
    ]
    for receipt in receipts:
        told = collector.request(receipt["request_id"], has("submit", "dispatch"))
        assert len({span.trace_id for span in told}) == 1
        [submit] = [span for span in told if span.name == "submit"]
        assert submit.parent_id == ""
        assert submit.trace_id != zero


def test_a_mistake_is_the_callers_and_a_trace_has_no_word_of_any_request(
    alice: httpx.Client, collector: Collector, server: Server, tmp_path: Any
) -> None:
    trace = uuid4().hex
    parent = f"00-{trace}-{CALLER}-01".encode()
    with serving(tmp_path) as site:
        fields = SMALL | {"prompt": "a canary", "image_url": f"{site}/canary.png?canary=1"}
        submitted(alice, f"/queue/{REMAKE}", fields, parent)
        told = collector.trace(trace, has("submit", "dispatch", f"generate_content {REMAKE}"))
    assert not any(span.is_error for span in told)
    answered = {span.name: span.attributes.get("http.response.status_code") for span in told}
    assert answered["dispatch"] == answered[f"generate_content {REMAKE}"] == 422
    everything = b"".join(collector.raw)
    for word in ("canary", "lighthouse", "hidden", ALICE.partition(":")[2]):
        assert word.encode() not in everything


def test_log_lines_name_the_request_and_its_trace(
    alice: httpx.Client, collector: Collector, server: Server
) -> None:
    trace = uuid4().hex
    parent = f"00-{trace}-{CALLER}-01".encode()
    receipt = submitted(alice, f"/queue/{ENDPOINT}", SMALL | {"seed": 55}, parent)
    collector.trace(trace, has("dispatch"))
    lines = [line for line in server.log.read_text().splitlines() if receipt["request_id"] in line]
    assert any(f"trace_id={trace}" in line for line in lines), json.dumps(lines)
