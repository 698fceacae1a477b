"""The canny endpoint from fal's Python client: the example of fal's page, and what may be wrong with it."""

import base64
from typing import Any

import fal_client
import httpx
import pytest

from tests.clients.halves import UPLOADING, collected, settled
from tests.clients.inputs import (
    CANNY,
    CANNY_CODE,
    CANNY_EXAMPLE,
    CANNY_OUTPUT,
    CANNY_STEPS,
    drawing,
    picture,
    shapes,
    steps,
)

pytestmark = UPLOADING

SEED = 7
QUICK = CANNY_EXAMPLE | {"num_inference_steps": 2, "seed": SEED}


def lines(status: Any) -> list[str]:
    return [line["message"] for line in status.logs or [] if line["message"].startswith("step")]


def check(output: dict[str, Any], stranger: httpx.Client) -> None:
    """The page's Output, and a JPEG as large as the control image."""
    assert output.keys() == CANNY_OUTPUT
    assert isinstance(output["seed"], int)
    assert output["has_nsfw_concepts"] == [False]
    assert output["timings"]["inference"] > 0
    [image] = output["images"]
    assert image.keys() == {"url", "content_type", "width", "height"}
    assert (image["content_type"], image["width"], image["height"]) == ("image/jpeg", 96, 64)
    answer = stranger.get(image["url"])
    assert answer.headers["content-type"] == "image/jpeg"
    assert picture(answer.content) == ("JPEG", (96, 64))


@pytest.mark.parametrize("fields", [CANNY_EXAMPLE, CANNY_CODE], ids=["example", "code"])
async def test_the_example_of_the_page_gives_a_picture_and_tells_of_its_steps(
    fields: dict[str, Any], fal: Any, canny_pictures: dict[str, str], stranger: httpx.Client
) -> None:
    enqueued: list[str] = []
    updates: list[Any] = []
    output = await settled(
        fal.subscribe(
            CANNY,
            fields | canny_pictures,
            with_logs=True,
            on_enqueue=enqueued.append,
            on_queue_update=updates.append,
        )
    )
    check(output, stranger)
    assert isinstance(updates[-1], fal_client.Completed)
    assert lines(updates[-1]) == steps(CANNY_STEPS)
    [request_id] = enqueued
    assert await settled(fal.result(CANNY, request_id)) == output


async def test_its_progress_can_be_followed(fal: Any, canny_pictures: dict[str, str]) -> None:
    handle = await settled(fal.submit(CANNY, CANNY_EXAMPLE | canny_pictures))
    *before, last = await collected(handle.iter_events(with_logs=True, interval=0.02))
    seen = [lines(each) for each in before if isinstance(each, fal_client.InProgress)]
    assert any(0 < len(each) < CANNY_STEPS for each in seen)
    assert all(each == steps(CANNY_STEPS)[: len(each)] for each in seen)
    assert lines(last) == steps(CANNY_STEPS)
    assert last.metrics["inference_time"] > 0


async def test_without_a_seed_one_is_drawn_and_gives_the_same_again(
    fal: Any, canny_pictures: dict[str, str]
) -> None:
    fields = CANNY_EXAMPLE | canny_pictures | {"num_inference_steps": 2, "sync_mode": True}
    first, other = [await settled(fal.run(CANNY, fields)) for _ in range(2)]
    assert first["seed"] != other["seed"]
    assert first["images"] != other["images"]
    again = await settled(fal.run(CANNY, fields | {"seed": first["seed"]}))
    assert again["images"] == first["images"]


async def test_whichever_way_the_pictures_come_they_give_the_same(
    fal: Any, canny_pictures: dict[str, str], stranger: httpx.Client
) -> None:
    images = {"control_image_url": shapes(), "image_url": drawing()}
    uploads = {field: await settled(fal.upload_image(image, "png")) for field, image in images.items()}
    inside = {field: fal_client.encode_image(image, "png") for field, image in images.items()}
    swapped = {"control_image_url": inside["image_url"], "image_url": inside["control_image_url"]}
    made = []
    for pictures in (uploads, inside, swapped):
        output = await settled(fal.run(CANNY, QUICK | pictures))
        made.append(stranger.get(output["images"][0]["url"]).content)
    assert made[0] == made[1] != made[2]


async def test_size_number_check_and_place_are_as_asked(fal: Any, canny_pictures: dict[str, str]) -> None:
    asked = {
        "image_size": {"width": 64, "height": 72},
        "num_images": 2,
        "enable_safety_checker": True,
        "sync_mode": True,
    }
    output = await settled(fal.run(CANNY, QUICK | canny_pictures | asked))
    assert output.keys() == CANNY_OUTPUT
    assert (output["seed"], output["has_nsfw_concepts"]) == (SEED, [False, False])
    for image in output["images"]:
        head, _, data = image["url"].partition(",")
        assert head == "data:image/jpeg;base64"
        assert picture(base64.b64decode(data, validate=True)) == ("JPEG", (64, 72))


async def test_a_stream_ends_with_the_output(
    fal: Any, canny_pictures: dict[str, str], stranger: httpx.Client
) -> None:
    *_, output = await collected(fal.stream(CANNY, QUICK | canny_pictures))
    check(output, stranger)


@pytest.mark.parametrize(
    ("change", "loc", "kind"),
    [
        ({"prompt": None}, ["prompt"], "missing"),
        ({"image_url": None}, ["image_url"], "missing"),
        ({"control_image_url": None}, ["control_image_url"], "missing"),
        ({"controlnet_conditioning_scale": "much"}, ["controlnet_conditioning_scale"], "float_parsing"),
        ({"num_inference_steps": 66}, ["num_inference_steps"], "less_than_equal"),
        ({"guidance_scale": -1}, ["guidance_scale"], "greater_than_equal"),
        ({"strength": 1.01}, ["strength"], "less_than_equal"),
        ({"num_images": 9}, ["num_images"], "less_than_equal"),
        ({"loras": [{"path": "someone/lora"}, {"scale": 1}]}, ["loras", 1, "path"], "missing"),
    ],
)
async def test_a_wrong_field_is_named_by_its_path(
    change: dict[str, Any], loc: list[str | int], kind: str, fal: Any, canny_pictures: dict[str, str]
) -> None:
    fields = CANNY_EXAMPLE | canny_pictures | change
    for call in (fal.submit, fal.run, fal.subscribe):
        with pytest.raises(fal_client.FalClientHTTPError) as caught:
            await settled(call(CANNY, fields))
        assert caught.value.status_code == 422
        [detail] = caught.value.message
        assert (detail["loc"], detail["type"]) == (["body", *loc], kind)


@pytest.mark.parametrize("field", ["image_url", "control_image_url", "loras"])
async def test_a_file_that_cannot_be_had_is_named_by_its_path(
    field: str, fal: Any, canny_pictures: dict[str, str]
) -> None:
    nowhere = f"{canny_pictures['image_url']}.none"
    change = {"loras": [{"path": nowhere}]} if field == "loras" else {field: nowhere}
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        await settled(fal.subscribe(CANNY, QUICK | canny_pictures | change))
    assert caught.value.status_code == 422
    [detail] = caught.value.message
    loc = ["loras", 0, "path"] if field == "loras" else [field]
    assert (detail["loc"], detail["type"]) == (["body", *loc], "file_download_error")
