"""OpenAI's own client, unmodified, at the OpenAI-style paths."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from schemas.errors import InternalError, WorkerLost
from schemas.jobs import Job, JobResult
from tests.gateway.conftest import ALICE
from tests.support.gateway import PICTURE, Place, gateway_at_work
from tests.support.jobs import ENDPOINT

REMAKE = "fal-ai/flux-lora/image-to-image"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(5000)
MODELS = {"gpt-image-2": {"generations": ENDPOINT, "edits": REMAKE}, "text-only": {"generations": ENDPOINT}}


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with gateway_at_work(tmp_path, keys=ALICE, openai_models=MODELS) as place:
        place.model.open.set()
        yield place


@pytest.fixture
async def client(place: Place) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{place.url}/v1", api_key=ALICE, max_retries=0) as client:
        yield client


def ran(place: Place, jobs: list[Job]) -> None:
    """Note in `jobs` what the model is asked for."""
    draw = place.model.outcome

    def outcome(job: Job) -> JobResult:
        jobs.append(job)
        return draw(job)

    place.model.outcome = outcome


@pytest.mark.parametrize("model", ["gpt-image-2", ENDPOINT, None])
async def test_a_prompt_becomes_pictures(model: str | None, place: Place, client: AsyncOpenAI) -> None:
    jobs: list[Job] = []
    ran(place, jobs)
    answer = await client.images.generate(prompt="a cat", model=model, n=2, size="640x480")
    assert [base64.b64decode(image.b64_json or "") for image in answer.data or []] == [PICTURE] * 2
    [job] = jobs
    assert job.endpoint_id == ENDPOINT
    assert job.input["image_size"] == {"width": 640, "height": 480}


async def test_pictures_come_by_url_when_asked_for(client: AsyncOpenAI, stranger: httpx.AsyncClient) -> None:
    answer = await client.images.generate(prompt="a cat", response_format="url")
    [image] = answer.data or []
    assert image.b64_json is None
    assert (await stranger.get(image.url or "")).content == PICTURE


async def test_fields_of_the_endpoint_s_own_pass_through(place: Place, client: AsyncOpenAI) -> None:
    jobs: list[Job] = []
    ran(place, jobs)
    extra = {"seed": 7, "num_inference_steps": 3, "image_size": "square"}
    raw = await client.images.with_raw_response.generate(
        prompt="a cat", size="auto", quality="high", user="someone", extra_body=extra
    )
    [job] = jobs
    assert {name: job.input[name] for name in extra} == extra
    assert raw.headers["x-darkroom-ignored-fields"] == "quality, user"


@pytest.mark.parametrize("model", ["gpt-image-2", REMAKE, None])
async def test_a_picture_is_remade(
    model: str | None, place: Place, client: AsyncOpenAI, stranger: httpx.AsyncClient
) -> None:
    jobs: list[Job] = []
    ran(place, jobs)
    answer = await client.images.edit(
        image=("cat.png", PNG), prompt="a dog", model=model, n=1, extra_body={"strength": 0.5}
    )
    [image] = answer.data or []
    assert base64.b64decode(image.b64_json or "") == PICTURE
    [job] = jobs
    assert (job.endpoint_id, job.input["prompt"], job.input["strength"]) == (REMAKE, "a dog", 0.5)
    assert (await stranger.get(job.input["image_url"])).content == PNG


async def test_an_edit_may_be_json(place: Place, client: AsyncOpenAI) -> None:
    answer = await client.post(
        "/images/edits",
        cast_to=object,
        body={"prompt": "a dog", "image": "https://example.com/cat.png", "model": REMAKE},
    )
    assert isinstance(answer, dict) and answer["data"]


async def test_the_models_are_listed(client: AsyncOpenAI) -> None:
    names = {model.id async for model in client.models.list()}
    assert {*MODELS, ENDPOINT, REMAKE} <= names


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"n": 9}, "n", "less_than_equal", "num_images: Input should be less than or equal to 4"),
        ({"size": "huge"}, "size", "enum", "image_size"),
        ({"size": "99999x99999"}, "size", "less_than_equal", "14142"),
        ({"response_format": "gif"}, "response_format", "literal_error", "b64_json or url"),
        ({"stream": True}, "stream", "unsupported", "not streamed"),
        ({"prompt": ""}, None, None, None),  # which is a prompt
    ],
)
async def test_a_wrong_field_is_a_bad_request_that_names_it(
    fields: dict[str, Any], param: str | None, code: str | None, message: str | None, client: AsyncOpenAI
) -> None:
    body = {"prompt": "a cat"} | fields
    if message is None:
        await client.images.generate(**body)
        return
    with pytest.raises(openai.BadRequestError) as raised:
        await client.images.generate(**body)
    assert (raised.value.param, raised.value.code) == (param, code)
    assert message in str(raised.value.body) and raised.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mask": ("mask.png", PNG)}, "mask"),  # no endpoint has one
        ({"image": [("a.png", PNG), ("b.png", PNG)]}, "image"),  # it takes one
        ({"image": ("a.png", b"text" * 2000)}, "image"),  # no picture
    ],
)
async def test_a_wrong_file_is_a_bad_request_that_names_it(
    fields: dict[str, Any], param: str, client: AsyncOpenAI
) -> None:
    body = {"prompt": "a dog", "image": ("cat.png", PNG), "model": REMAKE} | fields
    with pytest.raises(openai.BadRequestError) as raised:
        await client.images.edit(**body)
    assert raised.value.param == param


@pytest.mark.parametrize("model", ["dall-e-3", "fal-ai/nope", "text-only"])
async def test_an_unknown_model_is_not_found(model: str, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-image-2"):
        await client.images.edit(image=PNG, prompt="a dog", model=model)


async def test_a_wrong_key_is_told(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="invalid key credentials"):
        await client.with_options(api_key="alice:guess").images.generate(prompt="a cat")


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("POST", "generations", "alice:guess", 401),
        ("GET", "generations", "alice:s3cret", 405),
        ("POST", "variations", "alice:s3cret", 404),
    ],
)
async def test_what_never_comes_to_a_picture_is_told_in_openai_s_shape(
    method: str, path: str, key: str, status: int, stranger: httpx.AsyncClient
) -> None:
    headers = {"authorization": f"Bearer {key}"}
    answer = await stranger.request(method, f"/v1/images/{path}", headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
    assert error["message"] and error["code"]


async def test_a_broken_form_is_a_bad_request(place: Place, alice: httpx.AsyncClient) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = await alice.post("/v1/images/edits", content=b"nonsense", headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_a_failure_of_ours_is_tried_again_only_if_that_may_help(
    place: Place, client: AsyncOpenAI
) -> None:
    tries: list[Job] = []
    ran(place, tries)
    draw = place.model.outcome

    def breaks(job: Job) -> JobResult:
        draw(job)
        return JobResult.failure(InternalError("broken"))

    def recovers(job: Job) -> JobResult:
        drawn = draw(job)
        return drawn if len(tries) > 1 else JobResult.failure(WorkerLost("lost"))

    place.model.outcome = breaks
    with pytest.raises(openai.InternalServerError, match="broken"):
        await client.with_options(max_retries=2).images.generate(prompt="a cat")
    assert len(tries) == 1
    tries.clear()
    place.model.outcome = recovers
    await client.with_options(max_retries=2).images.generate(prompt="a cat")
    assert len(tries) == 2
