"""The universal endpoint from fal's Python client: the example of fal's page, on the model that it names."""

import io
import tarfile
from typing import Any

import fal_client
import httpx
import pytest

from tests.clients.halves import UPLOADING, settled
from tests.clients.inputs import UNIVERSAL, UNIVERSAL_EXAMPLE, UNIVERSAL_SIDE, drawing, picture, steps

pytestmark = UPLOADING

QUICK = UNIVERSAL_EXAMPLE | {"num_inference_steps": 2, "seed": 7}
FILE = {"url", "content_type", "file_name", "file_size"}


def lines(status: Any) -> list[str]:
    return [line["message"] for line in status.logs or [] if line["message"].startswith("step")]


async def test_the_example_of_the_page_gives_a_picture_and_tells_of_its_steps(
    fal: Any, stranger: httpx.Client
) -> None:
    updates: list[Any] = []
    output = await settled(
        fal.subscribe(UNIVERSAL, UNIVERSAL_EXAMPLE, with_logs=True, on_queue_update=updates.append)
    )
    assert lines(updates[-1]) == steps(UNIVERSAL_EXAMPLE["num_inference_steps"])
    assert output.keys() == {"images", "seed", "has_nsfw_concepts", "debug_latents", "debug_per_pass_latents"}
    assert (output["debug_latents"], output["debug_per_pass_latents"]) == (None, None)
    [image] = output["images"]
    assert image.keys() == FILE | {"width", "height"}
    answer = stranger.get(image["url"])
    assert len(answer.content) == image["file_size"]
    assert image["url"].endswith(image["file_name"])
    assert answer.headers["content-type"] == image["content_type"] == "image/jpeg"
    assert picture(answer.content) == ("JPEG", (UNIVERSAL_SIDE, UNIVERSAL_SIDE))


async def test_its_latents_come_as_a_tar_of_pictures(fal: Any, stranger: httpx.Client) -> None:
    asked = {"debug_latents": True, "debug_per_pass_latents": True, "num_images": 2}
    output = await settled(fal.run(UNIVERSAL, QUICK | asked))
    expected = {"debug_latents": "{}_{}.png", "debug_per_pass_latents": "{}_{}_0000.png"}
    for field, name in expected.items():
        assert output[field].keys() == FILE
        assert output[field]["content_type"] == "application/x-tar"
        data = stranger.get(output[field]["url"]).content
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert tar.getnames() == [
                name.format(f"{image:04}", f"{step:04}") for image in range(2) for step in range(2)
            ]


async def test_an_uploaded_picture_is_remade_on_another_model(fal: Any, stranger: httpx.Client) -> None:
    start = drawing((96, 72))
    url = await settled(fal.upload_image(start, "png"))
    output = await settled(fal.run(UNIVERSAL, QUICK | {"model_name": "sd15", "image_url": url}))
    assert picture(stranger.get(output["images"][0]["url"]).content) == ("JPEG", start.size)


@pytest.mark.parametrize(
    ("change", "loc", "kind"),
    [
        ({"model_name": None}, ["model_name"], "missing"),
        (
            {
                "timesteps": {"method": "array", "array": [900]},
                "sigmas": {"method": "array", "array": [9, 0]},
            },
            ["sigmas"],
            "value_error",
        ),
        ({"tile_width": 64}, ["tile_width"], "greater_than_equal"),
        ({"scheduler": "Euler B"}, ["scheduler"], "literal_error"),
        ({"embeddings": [{"path": "a/b"}, {"path": "c/d"}]}, ["embeddings"], "too_long"),
        ({"ip_adapter": [{"path": "a/b"}]}, ["ip_adapter", 0, "ip_adapter_image_url"], "missing"),
    ],
)
async def test_a_wrong_field_is_named_by_its_path(
    change: dict[str, Any], loc: list[str | int], kind: str, fal: Any
) -> None:
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        await settled(fal.submit(UNIVERSAL, UNIVERSAL_EXAMPLE | change))
    assert caught.value.status_code == 422
    [detail] = caught.value.message
    assert (detail["loc"], detail["type"]) == (["body", *loc], kind)


async def test_a_model_that_cannot_be_had_is_named_by_its_field(fal: Any) -> None:
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        await settled(fal.run(UNIVERSAL, QUICK | {"model_name": "no such model"}))
    assert caught.value.status_code == 422
    [detail] = caught.value.message
    assert (detail["loc"], detail["type"]) == (["body", "model_name"], "file_download_error")
