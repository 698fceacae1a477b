"""Pictures remade and edited, from fal's Python client: the examples of fal's pages."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import fal_client
import httpx
import pytest

from tests.clients.halves import UPLOADING, collected, settled
from tests.clients.inputs import (
    EDIT,
    EDIT_EXAMPLE,
    REMAKE,
    REMAKE_EXAMPLE,
    SIZE,
    drawing,
    encoded,
    picture,
    steps,
)
from tests.support.sites import serving

pytestmark = UPLOADING

SEED = 7
SEEDS = count(1000)  # of which none was used before
EXAMPLES = {REMAKE: REMAKE_EXAMPLE, EDIT: EDIT_EXAMPLE}
FORMATS = {REMAKE: "JPEG", EDIT: "PNG"}
STEPS = {REMAKE: 4, EDIT: 8}  # the inversion has as many as the denoising

each_endpoint = pytest.mark.parametrize("endpoint", EXAMPLES)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a picture called start.png can be had by http."""
    folder: Path = tmp_path_factory.mktemp("site")
    (folder / "start.png").write_bytes(encoded(drawing()))
    with serving(folder) as url:
        yield url


@pytest.fixture(params=["a data URI", "an upload", "a URL"])
async def source(request: pytest.FixtureRequest, fal: Any, site: str) -> str:
    """The start picture, as a client may give it."""
    ways: dict[str, Callable[[], Any]] = {
        "a data URI": lambda: fal_client.encode_image(drawing(), "png"),
        "an upload": lambda: fal.upload_image(drawing(), "png"),
        "a URL": lambda: f"{site}/start.png",
    }
    return str(await settled(ways[request.param]()))


@each_endpoint
async def test_an_example_gives_a_picture_and_tells_of_its_steps(
    endpoint: str, source: str, fal: Any, stranger: httpx.Client
) -> None:
    updates: list[Any] = []
    fields = EXAMPLES[endpoint] | {"image_url": source, "seed": next(SEEDS)}
    output = await settled(fal.subscribe(endpoint, fields, with_logs=True, on_queue_update=updates.append))
    assert output.keys() == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    assert (output["seed"], output["prompt"]) == (fields["seed"], fields["prompt"])
    assert output["has_nsfw_concepts"] == [False]
    assert output["timings"]["inference"] > 0
    [image] = output["images"]
    assert (image["width"], image["height"]) == (80, 48)  # as the picture it began with
    assert image["content_type"] == f"image/{FORMATS[endpoint].lower()}"
    answer = stranger.get(image["url"])
    assert answer.headers["content-type"] == image["content_type"]
    assert picture(answer.content) == (FORMATS[endpoint], (80, 48))
    assert isinstance(updates[-1], fal_client.Completed)
    assert steps_of(updates[-1]) == steps(STEPS[endpoint])


def steps_of(completed: Any) -> list[str]:
    return [line["message"] for line in completed.logs if line["message"].startswith("step")]


async def test_an_inversion_is_done_once(fal: Any, site: str) -> None:
    fields = EDIT_EXAMPLE | {"image_url": f"{site}/start.png", "seed": next(SEEDS)}
    counts = []
    for prompt in ("Wearing glasses", "Wearing a hat"):
        handle = await settled(fal.submit(EDIT, fields | {"prompt": prompt}))
        await settled(handle.get())
        counts.append(steps_of(await settled(handle.status(with_logs=True))))
    assert counts == [steps(8), steps(4)]


@each_endpoint
async def test_whichever_way_a_picture_comes_it_gives_the_same(
    endpoint: str, fal: Any, site: str, stranger: httpx.Client
) -> None:
    sources = [
        fal_client.encode_image(drawing(), "png"),
        await settled(fal.upload_image(drawing(), "png")),
        f"{site}/start.png",
    ]
    pictures = set()
    for source in sources:
        fields = EXAMPLES[endpoint] | {"image_url": source, "seed": SEED, "output_format": "png"}
        output = await settled(fal.run(endpoint, fields))
        pictures.add(stranger.get(output["images"][0]["url"]).content)
    assert len(pictures) == 1


@each_endpoint
@pytest.mark.parametrize("format", ["jpeg", "png"])
async def test_size_format_and_number_are_as_asked(
    endpoint: str, format: str, fal: Any, site: str, stranger: httpx.Client
) -> None:
    asked = {"image_size": SIZE, "output_format": format, "num_images": 2, "image_url": f"{site}/start.png"}
    output = await settled(fal.run(endpoint, EXAMPLES[endpoint] | asked))
    assert [(image["width"], image["height"]) for image in output["images"]] == [(64, 64)] * 2
    assert output["has_nsfw_concepts"] == [False, False]
    for image in output["images"]:
        assert picture(stranger.get(image["url"]).content) == (format.upper(), (64, 64))


@each_endpoint
async def test_without_a_seed_one_is_drawn_and_told(endpoint: str, fal: Any, site: str) -> None:
    fields = EXAMPLES[endpoint] | {"image_url": f"{site}/start.png", "sync_mode": True}
    drawn = [await settled(fal.run(endpoint, fields)) for _ in range(2)]
    assert drawn[0]["seed"] != drawn[1]["seed"]
    assert drawn[0]["images"] != drawn[1]["images"]
    again = await settled(fal.run(endpoint, fields | {"seed": drawn[0]["seed"]}))
    assert again["images"] == drawn[0]["images"]


@each_endpoint
async def test_a_stream_ends_with_the_output(endpoint: str, fal: Any, site: str) -> None:
    fields = EXAMPLES[endpoint] | {"image_url": f"{site}/start.png", "seed": SEED}
    *_, output = await collected(fal.stream(endpoint, fields))
    assert output["seed"] == SEED
    assert (output["images"][0]["width"], output["images"][0]["height"]) == (80, 48)


CONTROLNET = {"path": "someone/controlnet"}


@pytest.mark.parametrize(
    ("endpoint", "change", "loc", "kind"),
    [
        (REMAKE, {"image_url": None}, ["image_url"], "missing"),
        (REMAKE, {"strength": 0}, ["strength"], "greater_than_equal"),
        (REMAKE, {"loras": [{"scale": 1}]}, ["loras", 0, "path"], "missing"),
        (EDIT, {"image_url": None}, ["image_url"], "missing"),
        (EDIT, {"controlnets": [CONTROLNET]}, ["controlnets", 0, "control_image_url"], "missing"),
        (
            EDIT,
            {"controlnet_unions": [CONTROLNET | {"controls": [{"control_mode": "canny"}]}]},
            ["controlnet_unions", 0, "controls", 0, "control_image_url"],
            "missing",
        ),
        (EDIT, {"easycontrols": [{}]}, ["easycontrols", 0, "control_method_url"], "missing"),
        (EDIT, {"scheduler": "heun"}, ["scheduler"], "literal_error"),
        (EDIT, {"reverse_guidance_start": 9}, ["reverse_guidance_start"], "less_than"),
    ],
)
async def test_a_wrong_field_is_named_by_its_path(
    endpoint: str, change: dict[str, Any], loc: list[str | int], kind: str, fal: Any, site: str
) -> None:
    fields = EXAMPLES[endpoint] | {"image_url": f"{site}/start.png"} | change
    for call in (fal.submit, fal.run, fal.subscribe):
        with pytest.raises(fal_client.FalClientHTTPError) as caught:
            await settled(call(endpoint, fields))
        assert caught.value.status_code == 422
        found = {tuple(detail["loc"]): detail["type"] for detail in caught.value.message}
        assert found[("body", *loc)] == kind


@pytest.mark.parametrize(
    ("endpoint", "change", "loc"),
    [
        (REMAKE, {"image_url": "{site}/none.png"}, ["image_url"]),
        (REMAKE, {"loras": [{"path": "{site}/none.safetensors"}]}, ["loras", 0, "path"]),
        (EDIT, {"reference_image_url": "{site}/none.png"}, ["reference_image_url"]),
        (
            EDIT,
            {"controlnets": [{"path": "{site}/none", "control_image_url": "{site}/start.png"}]},
            ["controlnets", 0, "path"],
        ),
        (
            EDIT,
            {"control_loras": [{"path": "{site}/start.png", "control_image_url": "{site}/start.png"}]},
            ["control_loras", 0, "path"],  # no weights
        ),
    ],
)
async def test_a_file_that_cannot_be_had_is_named_by_its_path(
    endpoint: str, change: dict[str, Any], loc: list[str | int], fal: Any, site: str
) -> None:
    fields = placed({"image_url": "{site}/start.png"} | change, site)
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        await settled(fal.subscribe(endpoint, EXAMPLES[endpoint] | fields))
    assert caught.value.status_code == 422
    [detail] = caught.value.message
    assert (detail["loc"], detail["type"]) == (["body", *loc], "file_download_error")
    assert detail["msg"]


def placed(value: Any, site: str) -> Any:
    """The value, with the site's URL where it says so."""
    if isinstance(value, dict):
        return {name: placed(each, site) for name, each in value.items()}
    if isinstance(value, list):
        return [placed(each, site) for each in value]
    return value.replace("{site}", site) if isinstance(value, str) else value
