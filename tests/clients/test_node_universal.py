"""The universal endpoint from fal's JavaScript clients: the example of fal's page."""

from typing import Any

import httpx
import pytest

from tests.clients.conftest import Tell
from tests.clients.inputs import UNIVERSAL, UNIVERSAL_EXAMPLE, UNIVERSAL_SIDE, picture, steps

STEPS = 4


@pytest.fixture(scope="module")
def told(tell: Tell) -> dict[str, Any]:
    example = UNIVERSAL_EXAMPLE | {"num_inference_steps": STEPS}
    return tell("universal.mjs", {"endpoint": UNIVERSAL, "example": example})


def test_the_answer_has_its_files(told: dict[str, Any], stranger: httpx.Client) -> None:
    output = told["output"]
    [image] = output["images"]
    assert (image["width"], image["height"], image["content_type"]) == (
        UNIVERSAL_SIDE,
        UNIVERSAL_SIDE,
        "image/jpeg",
    )
    data = stranger.get(image["url"]).content
    assert picture(data) == ("JPEG", (UNIVERSAL_SIDE, UNIVERSAL_SIDE))
    assert len(data) == image["file_size"]
    assert output["debug_latents"]["content_type"] == "application/x-tar"
    assert output["debug_per_pass_latents"] is None


def test_a_subscriber_is_told_of_each_step(told: dict[str, Any]) -> None:
    progress = [[line for line in lines if line.startswith("step")] for lines in told["progress"]]
    assert progress[-1] == steps(STEPS)


@pytest.mark.parametrize(
    ("name", "field", "kind"),
    [("wrong", "tile_width", "greater_than_equal"), ("lost", "model_name", "file_download_error")],
)
def test_what_is_wrong_is_a_validation_error_with_its_path(
    name: str, field: str, kind: str, told: dict[str, Any]
) -> None:
    error = told[name]
    assert (error["name"], error["status"]) == ("ValidationError", 422)
    [fault] = error["fieldErrors"]
    assert (fault["loc"], fault["type"]) == (["body", field], kind)
