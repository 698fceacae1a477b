"""fal's JavaScript client in a page of another origin, in a real Chromium: what CORS allows it, no more."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from PIL import Image, ImageStat

from tests.clients.inputs import APP, WATCHED, log, picture
from tests.support.server import Server
from tests.support.sites import serving

PAGE = """<!doctype html>
<title>A page</title>
<link rel="icon" href="data:,">
<script type="module" src="page.js"></script>
"""
LARGE = 91 * 2**20  # the client sends more than 90 MiB in parts, whose ETags it reads


@pytest.fixture(scope="module")
def told(server: Server, node_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the story of the page came to."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.html").write_text(PAGE)
    with serving(folder) as site, serving(folder) as closed:
        query = urlencode({"server": server.url, "closed": closed, "large": LARGE})
        done = subprocess.run(
            ["node", "browser.mjs", str(folder), f"{site}/?{query}"],
            cwd=node_packages,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["origin"] == site != server.url
    return report


def test_run_resolves_to_the_output_and_its_request_id(told: dict[str, Any], alice: httpx.Client) -> None:
    result = told["run"]
    [image] = result["data"]["images"]
    assert (image["width"], image["height"], result["data"]["seed"]) == (64, 64, 11)
    assert alice.get(f"/queue/{APP}/requests/{result['requestId']}").json() == result["data"]


@pytest.mark.parametrize("mode", ["polling", "streaming"])
def test_a_subscriber_sees_each_log_line_once_and_then_the_output(
    mode: str, told: dict[str, Any], alice: httpx.Client
) -> None:
    seen = told[mode]
    assert seen["statuses"][-1] == "COMPLETED"
    assert seen["lines"] == log(WATCHED["num_inference_steps"])
    assert seen["result"]["requestId"] == seen["enqueued"]
    stored = alice.get(f"/queue/{APP}/requests/{seen['enqueued']}").json()
    assert seen["result"]["data"] == stored


def test_a_finished_request_is_found_again_by_its_id(told: dict[str, Any]) -> None:
    assert told["status"]["status"] == "COMPLETED"
    assert [line["message"] for line in told["status"]["logs"]] == log(WATCHED["num_inference_steps"])
    assert told["result"] == told["polling"]["result"]


@pytest.mark.parametrize("stream", ["stream", "clientStream"])  # by the proxy; with a token, past it
def test_a_stream_shows_previews_and_then_the_output(
    stream: str, told: dict[str, Any], server: Server
) -> None:
    *previews, _ = told[stream]["urls"]
    assert previews and set(previews) == {"data:image/jpeg;base64,"}
    [image] = told[stream]["last"]["images"]
    assert image["url"].startswith(f"{server.url}/files/")


def test_a_websocket_brings_pictures_and_says_what_is_wrong(told: dict[str, Any]) -> None:
    seen = told["realtime"]
    assert (seen["seed"], seen["size"], seen["error"]["name"]) == (11, [64, 64], "ApiError")
    assert "num_images: Input should be less than or equal to 4" in seen["error"]["message"]


def test_a_waiting_request_can_be_cancelled(told: dict[str, Any]) -> None:
    waiting = told["waiting"]
    assert waiting["status"]["status"] == "IN_QUEUE"
    assert waiting["cancel"] == {}  # it resolved, to nothing
    assert (waiting["result"]["name"], waiting["result"]["status"]) == ("ApiError", 499)
    assert waiting["result"]["message"] == "Request cancelled by the client."


def test_the_page_can_read_that_the_time_to_start_was_its_own(told: dict[str, Any]) -> None:
    late = told["waiting"]["late"]
    assert (late["name"], late["status"], late["timeoutType"]) == ("ApiError", 504, "user")


def test_what_the_page_uploads_arrives_whole(told: dict[str, Any], stranger: httpx.Client) -> None:
    blob, file = (stranger.get(told["uploads"][each]) for each in ("blob", "file"))
    assert (len(blob.content), blob.headers["content-type"]) == (told["uploads"]["size"], "image/png")
    assert picture(blob.content) == ("PNG", (80, 48))
    assert (file.content, file.headers["content-type"]) == (b"Hello", "text/plain")


def test_a_large_file_is_uploaded_in_parts(told: dict[str, Any], stranger: httpx.Client) -> None:
    answer = stranger.head(told["uploads"]["large"])
    assert answer.headers["content-length"] == str(LARGE)


def test_a_blob_in_an_input_is_uploaded_by_itself(told: dict[str, Any]) -> None:
    [image] = told["uploads"]["inside"]["data"]["images"]
    assert (image["width"], image["height"]) == (80, 48)


def test_the_page_can_read_the_bytes_of_a_picture(told: dict[str, Any], stranger: httpx.Client) -> None:
    answer = stranger.get(told["run"]["data"]["images"][0]["url"])
    seen = told["pictures"]
    assert (seen["type"], seen["bytes"]) == ("image/jpeg", len(answer.content))
    assert seen["etag"] == answer.headers["etag"]
    assert seen["part"] == {"status": 206, "bytes": 4}
    assert seen["range"] == f"bytes 2-5/{len(answer.content)}"


def test_a_picture_leaves_the_canvas_readable(told: dict[str, Any], stranger: httpx.Client) -> None:
    answer = stranger.get(told["run"]["data"]["images"][0]["url"])
    drawn = told["pictures"]["canvas"]
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (drawn["width"], drawn["height"]) == image.size
        assert drawn["mean"] == pytest.approx(ImageStat.Stat(image).mean, abs=2)


def test_the_browser_is_one_that_enforces_the_rules(told: dict[str, Any]) -> None:
    assert told["pictures"]["tainted"]["name"] == "SecurityError"  # drawn without CORS being asked for
    assert told["pictures"]["closed"]["name"] == "TypeError"  # a server that allows no page to read it


@pytest.mark.parametrize("call", ["run", "submit", "stream"])
def test_an_invalid_input_can_be_shown_beside_its_field(call: str, told: dict[str, Any]) -> None:
    error = told["invalid"][call]
    assert (error["name"], error["status"]) == ("ValidationError", 422)
    assert error["message"] == "num_inference_steps: Input should be less than or equal to 50"
    assert error["fieldErrors"] == error["body"]["detail"]
    [field] = error["fieldErrors"]
    assert (field["loc"], field["ctx"]) == (["body", "num_inference_steps"], {"le": 50})


@pytest.mark.parametrize("call", ["run", "submit", "stream"])
@pytest.mark.parametrize(
    ("mistake", "status", "message"),
    [
        ("wrongKey", 401, "invalid key credentials"),
        ("unknown", 404, 'Application "fal-ai/nope" not found'),
    ],
)
def test_a_refusal_can_be_read_as_well(
    mistake: str, status: int, message: str, call: str, told: dict[str, Any]
) -> None:
    error = told[mistake][call]
    assert (error["name"], error["status"], error["message"]) == ("ApiError", status, message)


def test_the_browser_blocked_nothing_of_the_server_s(told: dict[str, Any], server: Server) -> None:
    blocked = [each for each in told["complaints"] if "blocked by CORS policy" in each]
    assert len(blocked) == 1 and server.url not in blocked[0]  # the other server's
    assert all("Failed to load resource" in each for each in told["complaints"] if each not in blocked)
