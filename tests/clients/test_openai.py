"""OpenAI's own client against the whole server."""

import base64
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from tests.clients.inputs import ALICE, ENDPOINT, REMAKE, drawing, encoded, picture
from tests.support.server import Server

SMALL = {"num_inference_steps": 3, "seed": 7}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0) as client:
        yield client


def test_a_prompt_becomes_pictures(client: OpenAI) -> None:
    answer = client.images.generate(
        prompt="a lighthouse", model=ENDPOINT, n=2, size="96x64", extra_body=SMALL
    )
    for image in answer.data or []:
        assert picture(base64.b64decode(image.b64_json or "")) == ("JPEG", (96, 64))
    assert len(answer.data or []) == 2


def test_a_picture_is_remade(client: OpenAI) -> None:
    answer = client.images.edit(
        image=("start.png", encoded(drawing((64, 64)))), prompt="a lion", model=REMAKE, extra_body=SMALL
    )
    [image] = answer.data or []
    assert picture(base64.b64decode(image.b64_json or "")) == ("JPEG", (64, 64))


def test_a_wrong_field_is_named(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(prompt="a lighthouse", n=9)
    assert raised.value.param == "n"
