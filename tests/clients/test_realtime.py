"""Realtime with fal's own clients, unmodified."""

import base64
from typing import Any

import fal_client
import fal_client.client
import pytest

from tests.clients.conftest import Tell
from tests.clients.halves import Connect, settled
from tests.clients.inputs import ALICE, ENDPOINT, SMALL, picture


class Conversation:
    """A connection of either half of the Python client."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    async def __aenter__(self) -> "Conversation":
        is_async = hasattr(self._opened, "__aenter__")
        self._connection = await self._opened.__aenter__() if is_async else self._opened.__enter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        is_async = hasattr(self._opened, "__aexit__")
        await settled((self._opened.__aexit__ if is_async else self._opened.__exit__)(None, None, None))

    async def ask(self, fields: dict[str, Any]) -> Any:
        await settled(self._connection.send(fields))
        return await settled(self._connection.recv())


@pytest.mark.parametrize("use_jwt", [True, False])
async def test_python_gets_pictures_as_bytes(use_jwt: bool, fal: Any) -> None:
    async with Conversation(fal.realtime(ENDPOINT, use_jwt=use_jwt)) as conversation:
        for seed in (7, 8):
            answer = await conversation.ask(SMALL | {"seed": seed})
            [image] = answer["images"]
            assert picture(image["content"]) == ("JPEG", (64, 64))
            assert (image["content_type"], image["width"]) == ("image/jpeg", 64)
            assert (answer["seed"], answer["prompt"]) == (seed, SMALL["prompt"])


async def test_python_raises_what_is_wrong_and_goes_on(fal: Any) -> None:
    async with Conversation(fal.realtime(ENDPOINT, max_buffering=2)) as conversation:
        with pytest.raises(
            fal_client.client.RealtimeError, match="num_images: Input should be less"
        ) as raised:
            await conversation.ask(SMALL | {"num_images": 9})
        assert raised.value.error == "VALIDATION_ERROR"
        assert (await conversation.ask(SMALL))["seed"] == 7


async def test_python_raises_for_a_wrong_key(connect: Connect) -> None:
    fal = connect(ALICE.partition(":")[0] + ":guess")
    with pytest.raises(fal_client.FalClientHTTPError, match="invalid key credentials"):
        async with Conversation(fal.realtime(ENDPOINT)):
            pass
    with pytest.raises(fal_client.client.RealtimeError, match="invalid key credentials"):
        async with Conversation(fal.realtime(ENDPOINT, use_jwt=False)) as conversation:
            await settled(conversation._connection.recv())


@pytest.fixture(scope="module")
def told(tell: Tell) -> dict[str, Any]:
    return tell("realtime.mjs")


def test_javascript_gets_pictures_as_bytes(told: dict[str, Any]) -> None:
    first, second, _, last = told["conversation"]
    [image] = first["result"]["images"]
    assert picture(base64.b64decode(image["content"])) == ("JPEG", (64, 64))
    assert (image["content_type"], image["width"], first["result"]["seed"]) == ("image/jpeg", 64, 7)
    assert (second["result"]["seed"], second["result"]["request_id"]) == (8, "mine")
    assert last["result"]["images"] == first["result"]["images"]


def test_javascript_is_told_what_is_wrong_and_goes_on(told: dict[str, Any]) -> None:
    _, _, wrong, last = told["conversation"]
    assert wrong["error"]["name"] == "ApiError"
    assert "num_images: Input should be less than or equal to 4" in wrong["error"]["message"]
    assert "result" in last


def test_javascript_is_told_that_there_is_no_such_endpoint(told: dict[str, Any]) -> None:
    assert "Path /nope not found" in told["unknown"]["error"]["message"]
