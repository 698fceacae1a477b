"""The canny endpoint from fal's JavaScript clients: the code and the example of fal's page."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.conftest import Tell
from tests.clients.inputs import (
    CANNY,
    CANNY_CODE,
    CANNY_EXAMPLE,
    CANNY_OUTPUT,
    CANNY_STEPS,
    drawing,
    encoded,
    picture,
    shapes,
    steps,
)

STEPS = {"code": CANNY_STEPS, "example": CANNY_STEPS, "blobs": 1, "dataUris": 1}


@pytest.fixture(scope="module")
def told(
    tell: Tell, canny_pictures: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("files")
    images = {"control_image_url": shapes(), "image_url": drawing()}
    for field, image in images.items():
        (folder / field).write_bytes(encoded(image))
    given = {
        "endpoint": CANNY,
        "code": CANNY_CODE,
        "example": CANNY_EXAMPLE,
        "pictures": canny_pictures,
        "files": {field: str(folder / field) for field in images},
    }
    return tell("canny.mjs", given)


@pytest.mark.parametrize("name", ["code", "example", "queue", "blobs", "dataUris"])
def test_the_answer_is_the_page_s_output(name: str, told: dict[str, Any], stranger: httpx.Client) -> None:
    output = told[name]["output"]
    assert output.keys() == CANNY_OUTPUT
    assert isinstance(output["seed"], int)
    assert output["has_nsfw_concepts"] == [False]
    [image] = output["images"]
    assert image.keys() == {"url", "content_type", "width", "height"}
    assert (image["content_type"], image["width"], image["height"]) == ("image/jpeg", 96, 64)
    answer = stranger.get(image["url"])
    assert answer.headers["content-type"] == "image/jpeg"
    assert picture(answer.content) == ("JPEG", (96, 64))


@pytest.mark.parametrize("name", STEPS)
def test_a_subscriber_is_told_of_each_step_in_order(name: str, told: dict[str, Any]) -> None:
    seen = told[name]
    assert seen["statuses"][-1] == "COMPLETED"
    assert set(seen["statuses"]) <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
    progress = [[line for line in lines if line.startswith("step")] for lines in seen["progress"]]
    assert all(lines == steps(STEPS[name])[: len(lines)] for lines in progress)
    assert len(progress[-1]) == STEPS[name]


def test_what_was_submitted_is_followed_and_fetched_by_its_id(told: dict[str, Any]) -> None:
    assert told["queue"]["status"]["status"] == "COMPLETED"
    assert told["queue"]["output"]["seed"] == 7


def test_a_result_has_the_request_s_id(way: str, told: dict[str, Any]) -> None:
    if way == "serverless":
        pytest.skip("it hands out none with a result")
    assert told["code"]["requestId"] != told["example"]["requestId"]


def test_uploaded_and_inline_pictures_give_the_same(told: dict[str, Any], stranger: httpx.Client) -> None:
    urls = [told[name]["output"]["images"][0]["url"] for name in ("blobs", "dataUris")]
    assert stranger.get(urls[0]).content == stranger.get(urls[1]).content


@pytest.mark.parametrize("call", ["run", "subscribe"])
@pytest.mark.parametrize(
    ("field", "loc", "kind"),
    [
        ("control_image_url", ["control_image_url"], "missing"),
        ("strength", ["strength"], "less_than_equal"),
        ("path", ["loras", 0, "path"], "missing"),
    ],
)
def test_a_wrong_field_is_a_validation_error_with_its_path(
    field: str, loc: list[str | int], kind: str, call: str, told: dict[str, Any]
) -> None:
    error = told["wrong"][field][call]
    assert (error["name"], error["status"]) == ("ValidationError", 422)
    [fault] = error["fieldErrors"]
    assert (fault["loc"], fault["type"]) == (["body", *loc], kind)


def test_a_picture_that_cannot_be_had_is_a_validation_error_with_its_path(told: dict[str, Any]) -> None:
    error = told["lost"]
    assert (error["name"], error["status"]) == ("ValidationError", 422)
    [fault] = error["fieldErrors"]
    assert (fault["loc"], fault["type"]) == (["body", "control_image_url"], "file_download_error")
