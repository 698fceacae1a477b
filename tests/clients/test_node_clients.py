"""fal's JavaScript clients, unmodified, told by one line of configuration where the server is."""

from typing import Any

import httpx
import pytest

from tests.clients.conftest import Tell
from tests.clients.inputs import APP, WATCHED, log
from tests.support.server import Server


@pytest.fixture(scope="module")
def told(tell: Tell) -> dict[str, Any]:
    """What one run of all operations came to."""
    return tell("operations.mjs")


def output(way: str, result: dict[str, Any]) -> dict[str, Any]:
    """The endpoint's output. The newer client wraps it, together with the request id."""
    answer: dict[str, Any] = result if way == "serverless" else result["data"]
    return answer


def test_run_resolves_to_the_output(way: str, told: dict[str, Any], stranger: httpx.Client) -> None:
    answer = output(way, told["run"])
    [image] = answer["images"]
    assert (image["width"], image["height"], answer["seed"]) == (64, 64, 7)
    assert stranger.get(image["url"]).headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize("mode", ["polling", "streaming"])
def test_subscribe_resolves_to_the_output_of_what_was_enqueued(
    mode: str, way: str, told: dict[str, Any], alice: httpx.Client
) -> None:
    seen = told[mode]
    stored = alice.get(f"/queue/{APP}/requests/{seen['enqueued']}").json()
    assert output(way, seen["result"]) == stored
    assert seen["statuses"][-1] == "COMPLETED"
    assert set(seen["statuses"]) <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}


@pytest.mark.parametrize("mode", ["polling", "streaming"])
def test_a_subscriber_has_seen_each_log_line_once(mode: str, told: dict[str, Any]) -> None:
    assert told[mode]["lines"] == log(WATCHED["num_inference_steps"])


def test_the_request_id_is_the_server_s(way: str, told: dict[str, Any], alice: httpx.Client) -> None:
    if way == "serverless":
        pytest.skip("it hands out none with a result")
    assert told["polling"]["result"]["requestId"] == told["polling"]["enqueued"]
    assert told["streaming"]["result"]["requestId"] == told["streaming"]["enqueued"]
    status = alice.get(f"/queue/{APP}/requests/{told['run']['requestId']}/status")
    assert (status.status_code, status.json()["status"]) == (200, "COMPLETED")


def test_a_finished_request_is_found_again_by_its_id(way: str, told: dict[str, Any]) -> None:
    assert told["status"]["status"] == "COMPLETED"
    assert told["status"]["metrics"]["inference_time"] > 0
    assert [line["message"] for line in told["status"]["logs"]] == log(WATCHED["num_inference_steps"])
    assert output(way, told["result"]) == output(way, told["polling"]["result"])


def test_the_receipt_has_the_server_s_own_queue_urls(told: dict[str, Any], server: Server) -> None:
    receipt = told["waiting"]["receipt"]
    url = f"{server.url}/queue/{APP}/requests/{receipt['request_id']}"
    assert receipt["status"] == "IN_QUEUE"
    assert receipt["response_url"] == url
    assert receipt["status_url"] == f"{url}/status"
    assert receipt["cancel_url"] == f"{url}/cancel"


def test_a_waiting_request_can_be_cancelled(told: dict[str, Any]) -> None:
    waiting = told["waiting"]
    assert waiting["status"]["status"] == "IN_QUEUE"
    assert (waiting["early"]["name"], waiting["early"]["status"]) == ("ApiError", 400)
    assert waiting["early"]["message"] == "Request is still in progress"
    assert waiting["cancel"] == {}  # it resolved, to nothing
    assert waiting["cancelled"]["status"] == "COMPLETED"
    assert waiting["cancelled"]["error_type"] == "client_cancelled"
    assert (waiting["result"]["name"], waiting["result"]["status"]) == ("ApiError", 499)
    assert waiting["result"]["message"] == "Request cancelled by the client."
    assert (waiting["again"]["name"], waiting["again"]["status"]) == ("ApiError", 400)
    assert waiting["again"]["body"]["status"] == "ALREADY_COMPLETED"


def test_a_run_that_could_not_start_in_time_is_not_tried_again(way: str, told: dict[str, Any]) -> None:
    if way == "serverless":
        pytest.skip("it has no startTimeout")
    late = told["waiting"]["late"]
    assert (late["name"], late["status"], late["timeoutType"]) == ("ApiError", 504, "user")
    assert late["body"]["error_type"] == "request_timeout"


def test_a_subscriber_that_gives_up_cancels_its_request(
    way: str, told: dict[str, Any], alice: httpx.Client
) -> None:
    if way == "serverless":
        pytest.skip("the same code as its successor's")
    assert "timed out" in told["waiting"]["impatient"]["message"]
    status = alice.get(f"/queue/{APP}/requests/{told['waiting']['left']}/status").json()
    assert (status["status"], status["error_type"]) == ("COMPLETED", "client_cancelled")


def test_a_stream_shows_previews_and_then_the_output(told: dict[str, Any], server: Server) -> None:
    *previews, last = told["stream"]["partial"]
    assert previews and set(previews) == {"data:image/jpeg;base64,"}
    [image] = told["stream"]["last"]["images"]
    assert image["url"].startswith(f"{server.url}/files/") and image["url"].startswith(last)
    assert (image["width"], image["height"]) == (512, 512)


@pytest.mark.parametrize("call", ["run", "submit", "stream"])
@pytest.mark.parametrize(
    ("mistake", "status", "message"),
    [
        ("wrongKey", 401, "invalid key credentials"),
        ("unknown", 404, 'Application "fal-ai/nope" not found'),
    ],
)
def test_a_refusal_is_an_api_error_that_says_why(
    mistake: str, status: int, message: str, call: str, told: dict[str, Any]
) -> None:
    error = told[mistake][call]
    assert (error["name"], error["status"], error["message"]) == ("ApiError", status, message)


@pytest.mark.parametrize("call", ["run", "submit", "stream"])
def test_an_invalid_input_is_a_validation_error_that_names_the_field(call: str, told: dict[str, Any]) -> None:
    error = told["invalid"][call]
    assert (error["name"], error["status"]) == ("ValidationError", 422)
    assert error["message"] == "num_inference_steps: Input should be less than or equal to 50"
    [field] = error["fieldErrors"]
    assert field["loc"] == ["body", "num_inference_steps"]
    assert (field["type"], field["ctx"]) == ("less_than_equal", {"le": 50})
