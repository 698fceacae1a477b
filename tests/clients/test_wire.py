"""The wire protocol where fal's clients hide it: statuses, headers, and what no client would send."""

import base64
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from openapi_schema_validator import OAS30ReadValidator

from deployments.server import HEAD_S
from tests.clients.conftest import BODY_GRACE_S, MAX_BODY_BYTES
from tests.clients.inputs import (
    ALICE,
    APP,
    CANNY,
    CANNY_EXAMPLE,
    EDIT,
    EDIT_EXAMPLE,
    ENDPOINT,
    LONG,
    REMAKE,
    REMAKE_EXAMPLE,
    SMALL,
    UNIVERSAL,
    UNIVERSAL_EXAMPLE,
    WATCHED,
    drawing,
    encoded,
    log,
)
from tests.support.server import Server
from tests.support.watching import follow, submit

COMMON_KEYS = {"status", "request_id", "response_url", "status_url", "cancel_url", "logs", "metrics"}
TARGET = "x-fal-target-url"
JSON = {"content-type": "application/json"}


def finished(http: httpx.Client, receipt: dict[str, Any]) -> dict[str, Any]:
    """The last status of a request."""
    return [*follow(http, receipt)][-1]


def until(is_so: Callable[[], bool], limit_s: float = 30) -> None:
    """Ask the server again and again until it says so."""
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be so"


# --- the life of a request ---


def test_a_receipt_has_what_the_clients_read(alice: httpx.Client, server: Server) -> None:
    answer = alice.post(f"/queue/{ENDPOINT}", json=SMALL)
    receipt = answer.json()
    url = f"{server.url}/queue/{APP}/requests/{receipt['request_id']}"
    assert answer.status_code == 200
    assert receipt == {
        "status": "IN_QUEUE",
        "request_id": receipt["request_id"],
        "gateway_request_id": receipt["request_id"],
        "queue_position": 0,
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
        "logs": None,
        "metrics": {},
    }
    assert answer.headers["x-fal-request-id"] == receipt["request_id"]


def test_every_state_has_its_status_and_its_keys(alice: httpx.Client, busy: dict[str, Any]) -> None:
    first, second = submit(alice, SMALL), submit(alice, SMALL)
    for position, receipt in enumerate((first, second)):
        waiting = alice.get(receipt["status_url"])
        assert (waiting.status_code, waiting.json()["status"]) == (202, "IN_QUEUE")
        assert waiting.json().keys() >= COMMON_KEYS
        assert waiting.json()["queue_position"] == position
    running = alice.get(busy["status_url"])
    assert (running.status_code, running.json()["status"]) == (202, "IN_PROGRESS")
    assert running.json().keys() == COMMON_KEYS
    assert (running.json()["logs"], running.json()["metrics"]) == (None, {})

    alice.put(busy["cancel_url"])
    finished(alice, second)
    done = alice.get(second["status_url"])
    assert (done.status_code, done.json()["status"]) == (200, "COMPLETED")
    assert done.json().keys() >= COMMON_KEYS
    assert "queue_position" not in done.json()
    assert isinstance(done.json()["metrics"]["inference_time"], float)
    assert done.json().get("error") is done.json().get("error_type") is None
    assert done.headers["x-fal-request-id"] == second["request_id"]


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("?logs=1", 1 + 3),  # the JavaScript clients
        ("?logs=true", 1 + 3),  # the Python client
        ("?logs=0", None),
        ("?logs=false", None),
        ("", None),
    ],
)
def test_logs_are_told_to_whoever_asks(query: str, count: int | None, alice: httpx.Client) -> None:
    receipt = submit(alice, SMALL)
    finished(alice, receipt)
    logs = alice.get(receipt["status_url"] + query).json()["logs"]
    assert (None if logs is None else len(logs)) == count
    for line in logs or ():
        assert line.keys() >= {"message", "level", "source", "timestamp", "labels"}
        assert (line["level"], line["source"]) == ("INFO", "USER")


def test_the_result_of_an_unfinished_request_is_a_400(alice: httpx.Client, busy: dict[str, Any]) -> None:
    waiting = submit(alice, SMALL)
    for receipt in (waiting, busy):
        answer = alice.get(receipt["response_url"])
        assert answer.status_code == 400
        assert answer.json()["detail"] == answer.json()["message"] == "Request is still in progress"


def test_the_result_is_the_bare_output(alice: httpx.Client) -> None:
    receipt = submit(alice, SMALL)
    finished(alice, receipt)
    answer = alice.get(receipt["response_url"])
    assert answer.status_code == 200
    assert answer.json().keys() == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-fal-request-id"] == receipt["request_id"]


def test_a_cancelled_request_is_completed_with_an_error(alice: httpx.Client, busy: dict[str, Any]) -> None:
    receipt = submit(alice, SMALL)
    cancel = alice.put(receipt["cancel_url"], headers=JSON)  # announces a body and sends none, as clients do
    assert (cancel.status_code, cancel.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    status = alice.get(receipt["status_url"])
    assert (status.status_code, status.json()["status"]) == (200, "COMPLETED")
    assert status.json()["error_type"] == "client_cancelled"
    assert isinstance(status.json()["error"], str)
    result = alice.get(receipt["response_url"])
    assert result.status_code == 499
    assert result.json()["detail"] == "Request cancelled by the client."
    assert result.json()["error_type"] == result.headers["x-fal-error-type"] == "client_cancelled"
    again = alice.put(receipt["cancel_url"])
    assert (again.status_code, again.json()["status"]) == (400, "ALREADY_COMPLETED")


def test_an_unknown_request_is_not_found(alice: httpx.Client) -> None:
    url = f"/queue/{APP}/requests/{uuid4()}"
    for answer in (alice.put(f"{url}/cancel"), alice.get(f"{url}/status")):
        assert (answer.status_code, answer.json()["status"]) == (404, "NOT_FOUND")
        assert isinstance(answer.json()["detail"], str)
    assert alice.get(url).status_code == 404
    assert alice.get(f"{url}/status/stream").status_code == 404


def test_a_cancelled_request_frees_the_engine_within_a_step(
    alice: httpx.Client, busy: dict[str, Any]
) -> None:
    small = submit(alice, SMALL)
    assert alice.put(busy["cancel_url"]).status_code == 202
    assert finished(alice, small)["status"] == "COMPLETED"
    status = alice.get(f"{busy['status_url']}?logs=1").json()
    assert status["error_type"] == "client_cancelled"
    assert len(status["logs"]) < LONG["num_inference_steps"] / 2


@pytest.mark.parametrize("header", ["x-fal-request-start-timeout", "x-fal-request-timeout"])
def test_a_request_that_cannot_start_in_time_is_a_504(
    header: str, alice: httpx.Client, busy: dict[str, Any]
) -> None:
    answer = alice.post(f"/queue/{ENDPOINT}", json=SMALL, headers={header: "0.2"})
    status = finished(alice, answer.json())
    assert (status["status"], status["error_type"]) == ("COMPLETED", "request_timeout")
    queued = alice.get(answer.json()["response_url"])
    run = alice.post(f"/run/{ENDPOINT}", json=SMALL, headers={header: "0.2"})
    for late in (queued, run):
        assert late.status_code == 504
        assert late.json()["detail"] == "Request timed out"
        assert late.json()["error_type"] == late.headers["x-fal-error-type"] == "request_timeout"
        assert late.headers["x-fal-request-timeout-type"] == "user"  # or the clients would try again


def test_the_newer_name_of_the_start_timeout_wins(alice: httpx.Client, busy: dict[str, Any]) -> None:
    headers = {"x-fal-request-start-timeout": "0.2", "x-fal-request-timeout": "3600"}
    answer = alice.post(f"/run/{ENDPOINT}", json=SMALL, headers=headers)
    assert answer.status_code == 504


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (ENDPOINT, SMALL),
        (REMAKE, REMAKE_EXAMPLE),
        (EDIT, EDIT_EXAMPLE),
        (CANNY, CANNY_EXAMPLE | {"num_inference_steps": 4}),
        (UNIVERSAL, UNIVERSAL_EXAMPLE | {"num_inference_steps": 2}),
    ],
)
def test_what_a_model_answers_is_valid_by_its_own_document(
    endpoint: str, fields: dict[str, Any], alice: httpx.Client
) -> None:
    document = alice.get(f"/openapi/{endpoint}").json()
    result = document["paths"][f"/{endpoint}/requests/{{request_id}}"]["get"]["responses"]["200"]
    schema = result["content"]["application/json"]["schema"] | {"components": document["components"]}
    picture = base64.b64encode(encoded(drawing((64, 64)))).decode()
    url = f"data:image/png;base64,{picture}"
    pictures = {"image_url": url, "control_image_url": url}  # an endpoint ignores what it does not know
    answer = alice.post(f"/run/{endpoint}", json=fields | pictures)
    assert answer.status_code == 200
    OAS30ReadValidator(schema).validate(answer.json())


# --- the status stream ---


def test_the_status_stream_tells_each_line_once_and_ends_with_the_completion(alice: httpx.Client) -> None:
    receipt = submit(alice, WATCHED)
    statuses = [*follow(alice, receipt)]
    lines = [line["message"] for status in statuses for line in status["logs"]]
    assert lines == log(WATCHED["num_inference_steps"])
    assert [status["status"] for status in statuses].index("COMPLETED") == len(statuses) - 1
    assert all(status.keys() >= COMMON_KEYS for status in statuses)


def test_the_status_stream_of_a_finished_request_is_its_completion(alice: httpx.Client) -> None:
    receipt = submit(alice, SMALL)
    finished(alice, receipt)
    [status] = follow(alice, receipt)
    lines = [line["message"] for line in status["logs"]]
    assert (status["status"], lines) == ("COMPLETED", log(SMALL["num_inference_steps"]))


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "*/*"])
def test_what_is_a_stream_is_told_by_the_path_alone(accept: str, alice: httpx.Client) -> None:
    receipt = submit(alice, SMALL)
    answer = alice.get(f"{receipt['status_url']}/stream", headers={"accept": accept})
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert answer.headers["x-fal-request-id"] == receipt["request_id"]
    answer = alice.post(f"/run/{ENDPOINT}/stream", json=SMALL, headers={"accept": accept})
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert "images" in json.loads(answer.text.strip().rpartition("data: ")[2])


# --- callers that leave ---


def test_a_stream_whose_reader_leaves_is_cancelled(alice: httpx.Client) -> None:
    with alice.stream("POST", f"/run/{ENDPOINT}/stream", json=LONG) as answer:
        request_id = answer.headers["x-fal-request-id"]
        assert next(answer.iter_lines()).startswith("data: ")
    url = f"/queue/{APP}/requests/{request_id}/status"
    assert finished(alice, {"status_url": url})["error_type"] == "client_cancelled"


def test_a_run_whose_caller_leaves_is_cancelled(
    server: Server, alice: httpx.Client, bob: httpx.Client, busy: dict[str, Any]
) -> None:
    probe = bob.post(
        f"/queue/{ENDPOINT}", json=SMALL, headers={"x-fal-queue-priority": "low"}
    ).json()  # whatever waits stands before it

    def ahead() -> int:
        position: int = bob.get(probe["status_url"]).json()["queue_position"]
        return position

    assert ahead() == 0
    body = json.dumps(SMALL)
    call = f"POST /run/{ENDPOINT} HTTP/1.1\r\nhost: box\r\nauthorization: Key {ALICE}\r\n"
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as caller:
        caller.sendall(f"{call}content-length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: ahead() == 1)
    until(lambda: ahead() == 0)
    assert alice.get(busy["status_url"]).json()["status"] == "IN_PROGRESS"  # so the run never ran
    bob.put(probe["cancel_url"])


# --- runs that take long, and calls that come again ---


def test_a_long_run_is_kept_alive_and_cancelled_when_its_caller_leaves(alice: httpx.Client) -> None:
    with alice.stream("POST", f"/run/{ENDPOINT}", json=LONG) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert next(answer.iter_raw()) == b" "
    url = f"/queue/{APP}/requests/{answer.headers['x-fal-request-id']}/status"
    assert finished(alice, {"status_url": url})["error_type"] == "client_cancelled"


def test_a_long_run_that_ends_badly_breaks_off_and_says_why_when_it_comes_again(alice: httpx.Client) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        with alice.stream("POST", f"/run/{ENDPOINT}", json=LONG) as answer:
            chunks = answer.iter_raw()
            assert next(chunks) == b" "
            request_id = answer.headers["x-fal-request-id"]
            assert alice.put(f"/queue/{APP}/requests/{request_id}/cancel").status_code == 202
            assert set(chunks) <= {b" "}
    again = alice.post(f"/run/{ENDPOINT}", json=LONG)
    assert (again.status_code, again.headers["x-fal-request-id"]) == (499, request_id)


def test_a_submit_under_a_known_key_is_answered_with_its_request(alice: httpx.Client) -> None:
    headers = {"idempotency-key": str(uuid4())}
    first, second = (alice.post(f"/queue/{ENDPOINT}", json=SMALL, headers=headers) for _ in range(2))
    assert first.json()["request_id"] == second.json()["request_id"]
    listed = alice.get("/v1/models/requests", params={"limit": 1}).json()["items"]
    assert [item["request_id"] for item in listed] == [first.json()["request_id"]]


# --- addresses ---


@pytest.mark.parametrize(
    "form",
    [
        "/queue/fal-ai/flux/requests/{id}",  # what the receipt says and the clients build
        "/queue/fal-ai/flux/dev/requests/{id}",  # the full endpoint id, as printed on model pages
        "/fal-ai/flux/requests/{id}",  # at the bare root: only the queue has requests
        "/fal-ai/flux/dev/requests/{id}",
    ],
)
def test_both_forms_of_request_urls_are_served(form: str, alice: httpx.Client) -> None:
    receipt = submit(alice, SMALL)
    finished(alice, receipt)
    output = alice.get(receipt["response_url"]).json()
    url = form.format(id=receipt["request_id"])
    for tail in ("", "/", "/response", "/response/"):
        answer = alice.get(url + tail)
        assert (answer.status_code, answer.json()) == (200, output)
    for tail in ("/status", "/status/"):
        assert alice.get(url + tail).json()["status"] == "COMPLETED"
    for tail in ("/cancel", "/cancel/"):
        assert alice.put(url + tail).status_code == 400
    for tail in ("/status/stream", "/status/stream/"):
        assert alice.get(url + tail).headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("path", "headers", "service"),
    [
        ("/run/{id}", {}, "run"),  # a prefix
        ("/run/{id}/", {}, "run"),  # with a slash too many
        ("/queue/{id}", {}, "queue"),
        ("/queue/{id}/", {}, "queue"),
        ("/{id}", {}, "run"),  # the bare root
        ("/{id}/", {}, "run"),
        ("/{id}", {"x-fal-queue-priority": "normal"}, "queue"),  # which only submits carry
        ("/{id}", {"x-fal-queue-priority": "whatever"}, "queue"),
        ("/{id}?fal_max_queue_length=100", {}, "queue"),
        ("/{id}", {"host": "queue.fal.run"}, "queue"),  # fal's own names
        ("/{id}", {"host": "fal.run"}, "run"),
        ("/{id}", {"host": "queue.box.lan:8000"}, "queue"),  # and names that begin like them
        ("/run/{id}", {"host": "queue.box.lan", "x-fal-queue-priority": "low"}, "run"),  # a prefix wins
        ("/api/fal/proxy", {TARGET: "https://fal.run/{id}"}, "run"),  # the proxy
        ("/api/fal/proxy/", {TARGET: "https://fal.run/{id}/"}, "run"),
        ("/api/fal/proxy", {TARGET: "https://queue.fal.run/{id}"}, "queue"),
        ("/api/fal/proxy", {TARGET: "https://queue.fal.run/{id}?fal_max_queue_length=100"}, "queue"),
        ("/api/fal/proxy", {TARGET: "{server}/queue/{id}"}, "queue"),  # the server's own prefixes
    ],
)
def test_every_way_in_leads_to_its_service(
    path: str, headers: dict[str, str], service: str, alice: httpx.Client, server: Server
) -> None:
    names = {"id": ENDPOINT, "server": server.url}
    headers = {name: value.format(**names) for name, value in headers.items()}
    answer = alice.post(path.format(**names), json=SMALL, headers=headers)
    assert answer.status_code == 200
    assert ("images" in answer.json()) == (service == "run")
    assert ("status_url" in answer.json()) == (service == "queue")


def test_the_proxy_takes_any_method(alice: httpx.Client, busy: dict[str, Any]) -> None:
    waiting = submit(alice, SMALL)
    url = f"https://queue.fal.run/{APP}/requests/{waiting['request_id']}"

    def proxied(method: str, target: str) -> httpx.Response:
        return alice.request(method, "/api/fal/proxy", headers={TARGET: target})

    assert proxied("GET", f"{url}/status?logs=1").json()["logs"] == []
    assert proxied("PUT", f"{url}/cancel").status_code == 202
    stream = proxied("GET", f"{url}/status/stream")
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert proxied("GET", url).status_code == 499


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (None, 400),  # no target
        ("", 400),  # an empty one
        ("fal.run/fal-ai/flux/dev", 400),  # not a URL
        ("http://[::1/queue", 400),  # half an address
        ("file:///etc/passwd", 400),
        ("https://example.com/fal-ai/flux/dev", 412),  # someone else's
        ("https://fal.run.example.com/fal-ai/flux/dev", 412),  # a name that begins like fal's
        ("https://fal.run@example.com/fal-ai/flux/dev", 412),  # fal's name as a user's
        ("https://example.com/?https://fal.run/fal-ai/flux/dev", 412),  # fal's name further back
        ("http://127.0.0.1:1/queue/fal-ai/flux/dev", 412),  # another port of this machine
    ],
)
def test_the_proxy_has_no_other_targets(target: str | None, status: int, alice: httpx.Client) -> None:
    headers = {} if target is None else {TARGET: target}
    answer = alice.post("/api/fal/proxy", json=SMALL, headers=headers)
    assert (answer.status_code, answer.json()["error_type"]) == (status, "bad_request")
    assert answer.json()["message"]


def test_urls_in_answers_follow_the_proxy_in_front(alice: httpx.Client) -> None:
    headers = {"x-forwarded-proto": "https", "x-forwarded-host": "pictures.example"}
    receipt = alice.post(f"/queue/{ENDPOINT}", json=SMALL, headers=headers).json()
    url = f"https://pictures.example/queue/{APP}/requests/{receipt['request_id']}"
    assert (receipt["response_url"], receipt["status_url"]) == (url, f"{url}/status")
    output = alice.post(f"/run/{ENDPOINT}", json=SMALL, headers=headers).json()
    assert output["images"][0]["url"].startswith("https://pictures.example/files/")


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-host": "[::1"},  # half an address
        {"x-forwarded-host": "user@pictures.example"},  # a user in it
        {"x-forwarded-host": ","},  # a list of nothing
        {"x-forwarded-proto": "javascript"},  # a scheme that is no address's
    ],
)
def test_a_malformed_address_from_the_proxy_in_front_is_refused(
    headers: dict[str, str], alice: httpx.Client
) -> None:
    answer = alice.post(f"/queue/{ENDPOINT}", json=SMALL, headers=headers)
    assert (answer.status_code, answer.json()["error_type"]) == (400, "bad_request")


def test_a_get_takes_its_input_from_the_query(alice: httpx.Client) -> None:
    query = {"prompt": "a lighthouse", "image_size": "square", "num_inference_steps": "1", "seed": "7"}
    run = alice.get(f"/run/{ENDPOINT}", params=query)
    assert (run.status_code, run.json()["seed"]) == (200, 7)
    receipt = alice.get(f"/queue/{ENDPOINT}", params=query)
    assert receipt.json()["status"] == "IN_QUEUE"


@pytest.mark.parametrize("path", ["/run", "/queue", "/rest", "/cdn", "/files"])
def test_no_address_is_answered_with_a_redirect(path: str, alice: httpx.Client) -> None:
    for method in ("GET", "POST"):
        assert alice.request(method, path).status_code == 404


def test_a_proxied_host_without_a_path_is_not_a_redirect(alice: httpx.Client) -> None:
    answer = alice.post("/api/fal/proxy", json=SMALL, headers={TARGET: "https://queue.fal.run"})
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/run/fal-ai/nope", 404),  # no such application
        ("POST", "/queue/fal-ai/nope", 404),
        ("POST", "/queue/fal-ai/flux/nope", 404),  # no such path of it
        ("POST", "/queue/nope", 404),  # not an endpoint id
        ("POST", "/run/fal-ai/nope/stream", 404),  # a stream of none
        ("GET", "/files/0123456789abcdef0123456789abcdef.jpg", 404),  # no such picture
        ("GET", "/files/..%2f..%2fqueue.sqlite3", 404),  # no picture at all
        ("GET", "/rest/nope", 404),
        ("GET", "/cdn/nope", 404),
        ("GET", f"/queue/{APP}/requests/42/status", 404),  # not a request id
        ("GET", f"/queue/{APP}/requests/{uuid4()}/nope", 404),  # not a verb
        ("DELETE", f"/queue/{ENDPOINT}", 405),  # not a method of a submit
        ("PUT", f"/run/{ENDPOINT}", 405),
        ("GET", f"/queue/{APP}/requests/{uuid4()}/cancel", 405),  # nor of a cancel
        ("POST", f"/queue/{APP}/requests/{uuid4()}/status", 405),  # nor of a status
    ],
)
def test_what_does_not_exist_is_refused_in_fal_s_shape(
    method: str, path: str, status: int, alice: httpx.Client
) -> None:
    answer = alice.request(method, path)
    body = answer.json()
    assert answer.status_code == status
    assert body["detail"] == body["message"] and body["message"]
    assert body["error_type"] == answer.headers["x-fal-error-type"]
    assert answer.headers["x-fal-retryable"] == "false"


# --- who calls ---


@pytest.mark.parametrize(
    "authorization",
    [
        None,  # no key
        "",  # an empty one
        "Key",  # no credentials
        "Key alice:guess",  # a wrong secret
        "Key alice:",  # none
        "Key alice",
        "Key mallory:s3cret",  # an unknown id
        "Bearer alice:guess",
        f"Basic {ALICE}",  # another scheme
        ALICE,  # no scheme
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"/run/{ENDPOINT}"),
        ("POST", f"/queue/{ENDPOINT}"),
        ("POST", "/queue/fal-ai/nope"),  # the key is looked at before the path
        ("POST", "/api/fal/proxy"),  # and before the proxy's target
        ("GET", "/"),
    ],
)
def test_without_a_valid_key_nothing_is_served(
    method: str, path: str, authorization: str | None, stranger: httpx.Client
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    answer = stranger.request(method, path, content=b"not JSON", headers=headers)
    body = answer.json()
    assert (answer.status_code, body["error_type"]) == (401, "auth_error")
    assert answer.headers["content-type"] == "application/json"
    assert body["detail"] == body["message"]


@pytest.mark.parametrize("scheme", ["Key", "key", "KEY", "Bearer", "bearer"])
def test_both_schemes_take_a_key(scheme: str, stranger: httpx.Client) -> None:
    headers = {"authorization": f"{scheme} {ALICE}"}
    assert stranger.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(path: str, stranger: httpx.Client) -> None:
    assert stranger.get(path).status_code == 200


@pytest.mark.parametrize(
    ("method", "tail"),
    [("GET", ""), ("GET", "/status"), ("GET", "/status/stream"), ("PUT", "/cancel")],
)
def test_another_tenant_s_request_looks_like_none(
    method: str, tail: str, alice: httpx.Client, bob: httpx.Client, busy: dict[str, Any]
) -> None:
    own = {"date", "x-fal-request-id", "x-request-id"}  # headers that differ between any two answers

    def seen(request_id: str) -> tuple[int, bytes, list[tuple[str, str]]]:
        answer = bob.request(method, f"/queue/{APP}/requests/{request_id}{tail}")
        headers = [(name, value) for name, value in answer.headers.items() if name not in own]
        return answer.status_code, answer.content.replace(request_id.encode(), b"ID"), headers

    assert seen(busy["request_id"])[0] == 404
    assert seen(busy["request_id"]) == seen(str(uuid4()))
    assert alice.get(busy["status_url"]).json()["status"] == "IN_PROGRESS"


# --- headers ---


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/", 200),
        ("POST", f"/run/{ENDPOINT}", 422),
        ("POST", f"/queue/{ENDPOINT}", 422),
        ("POST", f"/run/{ENDPOINT}/stream", 422),
        ("POST", "/queue/fal-ai/nope", 404),
        ("PUT", f"/queue/{ENDPOINT}", 405),
        ("POST", "/api/fal/proxy", 400),
        ("GET", f"/queue/{APP}/requests/{uuid4()}", 404),
        ("OPTIONS", f"/queue/{ENDPOINT}", 200),
    ],
)
def test_every_answer_has_a_request_id_that_browsers_may_read(
    method: str, path: str, status: int, alice: httpx.Client
) -> None:
    answer = alice.request(method, path)
    assert answer.status_code == status
    assert answer.headers["x-fal-request-id"]
    assert answer.headers["access-control-allow-origin"] == "*"
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert exposed >= {
        "x-fal-request-id",
        "x-fal-request-timeout-type",
        "x-fal-error-type",
        "x-fal-retryable",
        "x-fal-billable-units",
        "x-fal-needs-retry",
        "etag",
        "content-range",
        "content-disposition",
    }


def test_a_refused_key_has_a_request_id_that_browsers_may_read(stranger: httpx.Client) -> None:
    answer = stranger.post(f"/run/{ENDPOINT}", json=SMALL)
    assert answer.status_code == 401
    assert answer.headers["x-fal-request-id"]
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-fal-request-id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("path", "method"),
    [
        (f"/run/{ENDPOINT}", "POST"),
        (f"/run/{ENDPOINT}/stream", "POST"),
        (f"/queue/{ENDPOINT}", "POST"),
        (f"/queue/{APP}/requests/{uuid4()}/cancel", "PUT"),
        ("/api/fal/proxy", "POST"),
        ("/files/0123456789abcdef0123456789abcdef.jpg", "GET"),
        (f"/{ENDPOINT}", "POST"),
    ],
)
def test_a_preflight_needs_no_key(path: str, method: str, stranger: httpx.Client) -> None:
    asked = ["authorization", "content-type", TARGET, "x-fal-queue-priority", "x-fal-some-day"]
    answer = stranger.options(
        path,
        headers={
            "origin": "https://app.example",
            "access-control-request-method": method,
            "access-control-request-headers": ",".join(asked),
        },
    )
    assert answer.status_code in (200, 204)
    assert answer.headers["access-control-allow-origin"] in ("*", "https://app.example")
    allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].split(",")}
    assert allowed >= set(asked)
    methods = {name.strip() for name in answer.headers["access-control-allow-methods"].split(",")}
    assert methods >= {"GET", "POST", "PUT", "DELETE", "OPTIONS"}
    assert "access-control-allow-private-network" not in answer.headers


def test_a_page_of_the_internet_may_use_a_server_in_the_browser_s_own_network(stranger: httpx.Client) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-private-network": "true"}
    answer = stranger.options(f"/run/{ENDPOINT}", headers={"origin": "https://app.example"} | asked)
    assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("name", ["x-fal-request-start-timeout", "x-fal-request-timeout"])
@pytest.mark.parametrize(
    "value",
    [
        "soon",  # not a number
        "0.1",  # not above the least
        "-1",
        "nan",
        "inf",
        "1e999",
    ],
)
def test_a_start_timeout_must_be_a_sensible_number(value: str, name: str, alice: httpx.Client) -> None:
    answer = alice.post(f"/queue/{ENDPOINT}", json=SMALL, headers={name: value})
    assert answer.status_code == 400
    assert name in answer.json()["message"]


def test_headers_of_fal_s_platform_change_nothing(alice: httpx.Client) -> None:
    headers = {
        "x-fal-runner-hint": "here",
        "x-fal-no-retry": "1",
        "x-fal-store-io": "1",
        "x-fal-object-lifecycle-preference": '{"expiration_duration_seconds":3600}',
        "x-fal-some-day": "maybe",
    }
    assert alice.post(f"/run/{ENDPOINT}", json=SMALL, headers=headers).status_code == 200


def test_an_unknown_field_is_ignored_and_named(alice: httpx.Client) -> None:
    answer = alice.post(f"/run/{ENDPOINT}", json=SMALL | {"num_steps": 4})
    assert answer.status_code == 200
    assert answer.headers["x-darkroom-ignored-fields"] == "num_steps"


# --- bodies that no client sends ---

DEEP = b"[" * 100_000 + b"]" * 100_000
BROKEN = [
    # not JSON
    (b"", 422),
    (b'{"prompt": "x"', 422),
    (b"prompt=x", 422),
    (b'{"prompt": "\xff\xfe"}', 422),  # not UTF-8
    (b'{"prompt": "\xed\xa0\x80"}', 422),  # a surrogate encoded as if it were a character
    # JSON, but not an object
    (b"[]", 422),
    (b"[{}]", 422),
    (b'"prompt"', 422),
    (b"7", 422),
    (b"null", 422),
    # numbers that are none
    (b'{"prompt": "x", "guidance_scale": NaN}', 422),
    (b'{"prompt": "x", "guidance_scale": -Infinity}', 422),
    (b'{"prompt": "x", "guidance_scale": 1e999}', 422),
    (b'{"prompt": "x", "whatever": 1e999}', 422),  # in a field that is ignored as well
    (b'{"prompt": "x", "seed": ' + b"9" * 5_000 + b"}", 422),  # longer than Python converts
    (b'{"prompt": "x", "num_inference_steps": 1.5}', 422),
    # text that no database and no header takes
    (b'{"prompt": "a\\u0000b"}', 422),
    (b'{"prompt": "a\\ud800b"}', 422),  # half a character
    (b'{"prompt": "x", "\\udfff": 1}', 422),  # in a name
    # too deep
    (b'{"prompt": ' + DEEP + b"}", 422),
    (DEEP, 422),
    (b'{"a":' * 1_000 + b"1" + b"}" * 1_000, 422),
    # too large
    (b'{"prompt": "' + b"x" * 32_769 + b'"}', 422),  # for the field
    (b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}', 413),  # for the server
    (b" " * (MAX_BODY_BYTES + 1), 413),
]


@pytest.mark.parametrize("path", [f"/run/{ENDPOINT}", f"/queue/{ENDPOINT}", f"/run/{ENDPOINT}/stream"])
@pytest.mark.parametrize(("body", "status"), BROKEN, ids=[body[:24].decode("latin-1") for body, _ in BROKEN])
def test_t33_a_broken_body_is_refused_in_fal_s_shape(
    body: bytes, status: int, path: str, alice: httpx.Client
) -> None:
    answer = alice.post(path, content=body, headers=JSON)
    refusal = answer.json()
    assert answer.status_code == status
    assert isinstance(refusal["message"], str) and refusal["message"]
    assert len(answer.content) < 5_000
    assert answer.headers["x-fal-request-id"]
    assert answer.headers["x-fal-retryable"] == "false"
    if status == 422:
        assert all(
            fault["loc"][0] == "body" and fault["msg"] and fault["type"] for fault in refusal["detail"]
        )
        assert refusal["detail"]
    else:
        assert refusal["detail"] == refusal["message"]


def test_a_query_is_held_to_the_same_rules_as_a_body(alice: httpx.Client) -> None:
    answer = alice.get(f"/queue/{ENDPOINT}?prompt=a%00b")
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", "prompt"])


def test_t19_a_body_of_unknown_length_is_bounded_as_well(alice: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(MAX_BODY_BYTES // 1_000):
            yield b"x" * 1_000
        yield b'"}'

    answer = alice.post(f"/queue/{ENDPOINT}", content=chunks(), headers=JSON)
    assert answer.status_code == 413


def test_a_body_of_the_largest_size_is_read(alice: httpx.Client) -> None:
    body = json.dumps(SMALL).encode()
    answer = alice.post(f"/queue/{ENDPOINT}", content=body.ljust(MAX_BODY_BYTES), headers=JSON)
    assert answer.status_code == 200


# --- callers that hold connections, and what is Serve's own ---


def test_t18_headers_that_do_not_come_are_given_up(server: Server) -> None:
    place = urlsplit(server.url)
    began = time.monotonic()
    with ExitStack() as stack:
        silent, stuck, dripping = (
            stack.enter_context(socket.create_connection((place.hostname, place.port), timeout=HEAD_S + 30))
            for _ in range(3)
        )
        stuck.sendall(b"GET /hea")
        dripping.sendall(b"GET /health HTTP/1.1\r\nhost: box\r\nx-drop: ")
        dripping.settimeout(1)
        while not (answer := _received(dripping)):
            dripping.sendall(b"x")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert all(held.recv(65_536).startswith(b"HTTP/1.1 408 ") for held in (silent, stuck))
    assert time.monotonic() - began < HEAD_S + 30


def _received(connection: socket.socket) -> bytes:
    """What has come within the connection's timeout."""
    try:
        return connection.recv(65_536)
    except TimeoutError:
        return b""


def test_t18_a_body_shorter_than_it_says_is_given_up(server: Server) -> None:
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=BODY_GRACE_S + 30) as sender:
        head = f"POST /queue/{ENDPOINT} HTTP/1.1\r\nhost: box\r\nauthorization: Key {ALICE}\r\n"
        sender.sendall(head.encode() + b'content-length: 100\r\n\r\n{"prompt": "x"}')
        answer = HTTPResponse(sender)
        answer.begin()
        body = json.loads(answer.read())
    assert (answer.status, body["error_type"]) == (408, "request_timeout")
    assert body["detail"] == body["message"]


def test_a_time_limit_of_serve_s_own_is_not_the_callers_to_set(alice: httpx.Client) -> None:
    headers = {"x-request-timeout-seconds": "0.001"}
    assert alice.post(f"/run/{ENDPOINT}", json=SMALL, headers=headers).status_code == 200
