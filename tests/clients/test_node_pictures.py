"""Pictures remade and edited, from fal's JavaScript clients: the examples of fal's pages."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.conftest import Tell
from tests.clients.inputs import (
    EDIT,
    EDIT_EXAMPLE,
    REMAKE,
    REMAKE_EXAMPLE,
    drawing,
    encoded,
    picture,
    steps,
)
from tests.support.sites import serving

EXAMPLES = {REMAKE: REMAKE_EXAMPLE, EDIT: EDIT_EXAMPLE}
FORMATS = {REMAKE: "JPEG", EDIT: "PNG"}
STEPS = {REMAKE: 4, EDIT: 8}  # the inversion has as many as the denoising


@pytest.fixture(scope="module")
def told(tell: Tell, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("site")
    path = folder / "start.png"
    path.write_bytes(encoded(drawing()))
    with serving(folder) as url:
        given = {"examples": EXAMPLES, "file": str(path), "url": f"{url}/start.png"}
        return tell("pictures.mjs", given)


@pytest.mark.parametrize("source", ["dataUri", "blob", "file", "url"])
@pytest.mark.parametrize("endpoint", EXAMPLES)
def test_an_example_gives_a_picture_and_tells_of_its_steps(
    endpoint: str, source: str, told: dict[str, Any], stranger: httpx.Client
) -> None:
    seen = told["examples"][endpoint][source]
    output = seen["output"]
    assert output.keys() == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert output["prompt"] == EXAMPLES[endpoint]["prompt"]
    assert output["seed"] >= 2000  # as the script asked
    assert output["has_nsfw_concepts"] == [False]
    [image] = output["images"]
    assert (image["width"], image["height"]) == (80, 48)
    assert image["content_type"] == f"image/{FORMATS[endpoint].lower()}"
    assert picture(stranger.get(image["url"]).content) == (FORMATS[endpoint], (80, 48))
    assert seen["statuses"][-1] == "COMPLETED"
    assert [line for line in seen["lines"] if line.startswith("step")] == steps(STEPS[endpoint])


def test_a_file_that_was_uploaded_and_a_picture_made_here_can_be_used(told: dict[str, Any]) -> None:
    for name in ("uploaded", "chained"):
        [image] = told[name]["output"]["images"]
        assert (image["width"], image["height"]) == (80, 48)


@pytest.mark.parametrize("call", ["run", "subscribe"])
def test_a_missing_field_inside_is_a_validation_error_with_its_path(call: str, told: dict[str, Any]) -> None:
    error = told["missing"][call]
    assert (error["name"], error["status"]) == ("ValidationError", 422)
    assert error["message"] == "controlnets.0.control_image_url: Field required"
    [field] = error["fieldErrors"]
    assert field["loc"] == ["body", "controlnets", 0, "control_image_url"]
    assert field["type"] == "missing"


def test_a_picture_that_cannot_be_had_is_a_validation_error_with_its_path(told: dict[str, Any]) -> None:
    error = told["lost"]
    assert (error["name"], error["status"]) == ("ValidationError", 422)
    [field] = error["fieldErrors"]
    assert (field["loc"], field["type"]) == (["body", "image_url"], "file_download_error")
    assert error["message"] == f"image_url: {field['msg']}"
