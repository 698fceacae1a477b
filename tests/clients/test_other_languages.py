"""What fal's Swift, Java, Kotlin and Dart clients send, by their source, and what they need in the answers.

The first three take a proxy's address, which is ours; what Swift sends past it goes to fal's own names.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgpack
import pytest
import websockets.sync.client

from tests.clients.inputs import (
    ALICE,
    APP,
    ENDPOINT,
    REMAKE,
    SMALL,
    WATCHED,
    drawing,
    encoded,
    log,
    picture,
)
from tests.support.receivers import Receiver
from tests.support.server import Server

PROXY = "/api/fal/proxy"
LEVELS = {"STDERR", "STDOUT", "ERROR", "INFO", "WARN", "DEBUG"}
JSON = {"accept": "application/json", "content-type": "application/json"}
CLIENTS = {
    "swift": JSON | {"user-agent": "fal.ai/swift-client 0.6.0 - Version 17.5"},
    "java": JSON | {"content-type": "application/json; charset=utf-8", "user-agent": "okhttp/4.12.0"},
    "dart": JSON | {"content-type": "application/json; charset=utf-8", "x-fal-user-agent": "fal-dart"},
}
LOGS = {"swift": "logs=true", "java": "logs=1", "dart": "logs=1"}


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def http(client: str, server: Server) -> Iterator[httpx.Client]:
    """What one of the clients sends with everything."""
    headers = CLIENTS[client] | {"authorization": f"Key {ALICE}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        yield http


def send(http: httpx.Client, method: str, url: str, fields: Any = None) -> Any:
    """By way of the proxy."""
    content = None if fields is None else json.dumps(fields)
    answer = http.request(method, PROXY, content=content, headers={"x-fal-target-url": url})
    assert answer.is_success, answer.text
    return answer.json()


def check_status(status: dict[str, Any], request_id: str) -> None:
    """What one of them would not do without."""
    assert status["status"] in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
    assert status["request_id"] == request_id
    assert {"response_url", "status_url", "cancel_url", "logs"} <= status.keys()
    assert status["status"] != "IN_QUEUE" or isinstance(status["queue_position"], int)
    for line in status["logs"] or ():
        assert isinstance(line["message"], str) and isinstance(line["timestamp"], str)
        assert line["labels"] == {"level": line["level"], "source": "USER"}
        assert line["level"] in LEVELS


# --- by way of the proxy ---


def test_run_answers_with_the_output(http: httpx.Client, stranger: httpx.Client) -> None:
    output = send(http, "POST", f"https://fal.run/{ENDPOINT}", SMALL)
    assert picture(stranger.get(output["images"][0]["url"]).content) == ("JPEG", (64, 64))


def test_a_request_is_polled_until_its_output_is_there(client: str, http: httpx.Client) -> None:
    request_id = send(http, "POST", f"https://queue.fal.run/{ENDPOINT}", SMALL)["request_id"]
    url = f"https://queue.fal.run/{APP}/requests/{request_id}"
    status: dict[str, Any] = {"status": None}
    while status["status"] != "COMPLETED":
        status = send(http, "GET", f"{url}/status?{LOGS[client]}")
        check_status(status, request_id)
    assert [line["message"] for line in status["logs"]] == log(SMALL["num_inference_steps"])
    assert send(http, "GET", url)["seed"] == SMALL["seed"]


def test_a_file_is_uploaded_and_used(http: httpx.Client) -> None:
    wish = {"content_type": "image/png", "file_name": "A3D1.png"}
    urls = send(http, "POST", "https://rest.alpha.fal.ai/storage/upload/initiate", wish)
    sent = httpx.put(urls["upload_url"], content=encoded(drawing()), headers={"content-type": "image/png"})
    assert sent.is_success
    start = {"image_url": urls["file_url"], "prompt": "a lion", "num_inference_steps": 3}
    assert send(http, "POST", f"https://fal.run/{REMAKE}", start)["images"][0]["width"] == 80


def test_a_refusal_is_a_status_with_text_in_its_detail(http: httpx.Client) -> None:
    target = {"x-fal-target-url": "https://queue.fal.run/fal-ai/nope"}
    answer = http.post(PROXY, content="{}", headers=target)
    assert (answer.status_code, answer.json()["detail"]) == (404, 'Application "fal-ai/nope" not found')


# --- Java and Kotlin ---


def test_java_reads_the_status_stream_to_its_end(server: Server) -> None:
    """Its subscribe does; it says twice what it accepts."""
    accepts = [("accept", "application/json"), ("accept", "text/event-stream")]
    headers = [*accepts, ("content-type", "application/json"), ("authorization", f"Key {ALICE}")]
    with httpx.Client(base_url=server.url, headers=headers, timeout=10) as http:
        request_id = send(http, "POST", f"https://queue.fal.run/{ENDPOINT}", WATCHED)["request_id"]
        target = f"https://queue.fal.run/{APP}/requests/{request_id}/status/stream?logs=1"
        with http.stream("GET", PROXY, headers={"x-fal-target-url": target}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]
    for event in events:
        check_status(event, request_id)
    assert events[-1]["status"] == "COMPLETED"


def test_java_asks_for_a_webhook(receiver: Receiver, server: Server) -> None:
    headers = CLIENTS["java"] | {"authorization": f"Key {ALICE}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        target = httpx.URL(f"https://queue.fal.run/{ENDPOINT}", params={"fal_webhook": receiver.url})
        receipt = send(http, "POST", str(target), SMALL)
    assert json.loads(receiver.next().body)["request_id"] == receipt["request_id"]


# --- Dart in a browser ---


def test_a_browser_lets_dart_name_itself(stranger: httpx.Client) -> None:
    asked = "accept,authorization,content-type,x-fal-target-url,x-fal-user-agent"
    headers = {"origin": "https://an.app", "access-control-request-method": "POST"}
    answer = stranger.options(PROXY, headers=headers | {"access-control-request-headers": asked})
    allowed = answer.headers["access-control-allow-headers"].replace(" ", "").lower().split(",")
    assert answer.is_success and set(asked.split(",")) <= set(allowed)


# --- Swift, past the proxy: where fal's names lead to the server ---


@pytest.fixture
def token(server: Server) -> str:
    headers = CLIENTS["swift"] | {"authorization": f"Key {ALICE}"}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        wish = {"allowed_apps": ["flux"], "token_expiration": 120}
        given: str = send(http, "POST", "https://rest.alpha.fal.ai/tokens/", wish)
    return given


def test_swift_streams_by_a_token(token: str, stranger: httpx.Client) -> None:
    headers = {"host": "fal.run", "accept": "text/event-stream", "content-type": "application/json"}
    with stranger.stream(
        "POST", f"/{ENDPOINT}/stream?fal_jwt_token={token}", headers=headers, json=WATCHED
    ) as answer:
        assert answer.status_code == 200
        events = [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]
    assert all(event["images"] for event in events)
    assert events[-1]["seed"] == WATCHED["seed"]


def test_swift_sends_text_on_its_websocket_and_reads_msgpack(token: str, server: Server) -> None:
    url = f"{server.url.replace('http', 'ws', 1)}/run/{ENDPOINT}/realtime?fal_jwt_token={token}"
    with websockets.sync.client.connect(url) as socket:
        socket.send(json.dumps(SMALL))
        answer = msgpack.unpackb(socket.recv(60))
    assert picture(answer["images"][0]["content"]) == ("JPEG", (64, 64))
