"""Realtime on the wire: tokens, frames, and what becomes of messages that come too fast."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from deployments.gateway.keys import Keys, parse
from schemas.errors import InternalError
from schemas.jobs import JobResult
from tests.gateway.conftest import ALICE, BOB
from tests.support.gateway import PICTURE, Place, gateway_at_work
from tests.support.jobs import ENDPOINT

APP = "fal-ai/flux"
PROMPT: dict[str, Any] = {"prompt": "a cat"}


async def token(http: httpx.AsyncClient, app: str = "flux") -> str:
    answer = await http.post("/rest/tokens/", json={"allowed_apps": [app], "token_expiration": 120})
    assert answer.status_code == 200
    found: str = answer.json()
    return found


@asynccontextmanager
async def connected(
    place: Place, query: str = "", key: str | None = ALICE, endpoint: str = ENDPOINT
) -> AsyncIterator[ClientConnection]:
    headers = {} if key is None else {"authorization": f"Key {key}"}
    url = f"{place.url.replace('http', 'ws', 1)}/run/{endpoint}/realtime{query}"
    async with connect(url, additional_headers=headers) as socket:
        yield socket


async def ask(socket: ClientConnection, message: Any) -> Any:
    await socket.send(message if isinstance(message, bytes | str) else msgpack.packb(message))
    return await receive(socket)


async def receive(socket: ClientConnection) -> Any:
    """What a frame says: the binary ones are msgpack, the others JSON."""
    frame = await socket.recv()
    return msgpack.unpackb(frame) if isinstance(frame, bytes) else json.loads(frame)


# --- tokens ---


@pytest.mark.parametrize("path", ["/rest/tokens", "/rest/tokens/"])
async def test_the_clients_get_the_bare_token(path: str, alice: httpx.AsyncClient) -> None:
    answer = await alice.post(path, json={"allowed_apps": ["flux"], "token_expiration": 120})
    actor = await Keys(parse(ALICE)).actor([], token=answer.json(), path=f"{ENDPOINT}/realtime")
    assert actor.tenant == "alice"


async def test_the_newer_form_wraps_it(alice: httpx.AsyncClient) -> None:
    answer = await alice.post("/rest/tokens/realtime", json={"allowed_apps": [APP], "duration": 60})
    actor = await Keys(parse(ALICE)).actor([], token=answer.json()["token"], path=f"{ENDPOINT}/realtime")
    assert actor.tenant == "alice"


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"allowed_apps": []},
        {"allowed_apps": "flux"},
        {"allowed_apps": ["flux"] * 9},
        {"allowed_apps": ["flux"], "token_expiration": 0},
        {"allowed_apps": ["flux"], "token_expiration": 10**9},
    ],
)
async def test_a_malformed_wish_is_refused(wish: dict[str, Any], alice: httpx.AsyncClient) -> None:
    answer = await alice.post("/rest/tokens/", json=wish)
    assert answer.status_code == 422 and answer.json()["message"]


async def test_a_token_takes_a_key(alice: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    wish = {"allowed_apps": ["flux"]}
    assert (await stranger.post("/rest/tokens/", json=wish)).status_code == 401
    query = {"fal_jwt_token": await token(alice)}
    assert (await stranger.post("/rest/tokens/", json=wish, params=query)).status_code == 401


async def test_a_browser_streams_with_a_token(alice: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    query = {"fal_jwt_token": await token(alice)}
    answer = await stranger.post(f"/run/{ENDPOINT}/stream", json=PROMPT, params=query)
    assert answer.headers["content-type"].startswith("text/event-stream")
    request_id = answer.headers["x-fal-request-id"]
    status = await alice.get(f"/queue/{APP}/requests/{request_id}/status")  # so it is alice's
    assert status.status_code == 200
    elsewhere = await stranger.post("/run/fal-ai/flux-lora/image-to-image", json=PROMPT, params=query)
    assert elsewhere.status_code == 401
    assert (await stranger.get("/", params=query)).status_code == 401


# --- messages ---


async def test_an_answer_has_the_pictures_in_it(place: Place) -> None:
    async with connected(place) as socket:
        answer = await ask(socket, PROMPT | {"seed": 7, "num_images": 2})
    image = {"content": PICTURE, "content_type": "image/jpeg", "width": 64, "height": 48}
    assert answer["images"] == [image] * 2
    assert (answer["seed"], answer["prompt"]) == (7, "a cat")


async def test_the_same_request_is_in_the_queue(place: Place, alice: httpx.AsyncClient) -> None:
    async with connected(place) as socket:
        request_id = (await ask(socket, PROMPT))["request_id"]
    output = (await alice.get(f"/queue/{APP}/requests/{request_id}")).json()
    assert (await alice.get(output["images"][0]["url"])).content == PICTURE


async def test_a_caller_s_own_request_id_comes_back(place: Place) -> None:
    async with connected(place) as socket:
        assert (await ask(socket, PROMPT | {"request_id": "mine"}))["request_id"] == "mine"


async def test_a_message_may_be_json(place: Place) -> None:
    async with connected(place) as socket:
        assert (await ask(socket, json.dumps(PROMPT)))["prompt"] == "a cat"


async def test_bytes_in_a_message_are_a_file(place: Place, alice: httpx.AsyncClient) -> None:
    endpoint = "fal-ai/flux-lora/image-to-image"
    picture = b"\x89PNG\r\n\x1a\n" + bytes(5000)
    async with connected(place, endpoint=endpoint) as socket:
        request_id = (await ask(socket, PROMPT | {"image_url": picture}))["request_id"]
    record = await place.queue.get(request_id, "alice")
    assert record is not None
    assert (await alice.get(record.job.input["image_url"])).content == picture


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({}, "prompt: Field required"),
        (PROMPT | {"num_images": 5}, "num_images: Input should be less than or equal to 4"),
        (PROMPT | {"guidance_scale": float("nan")}, "guidance_scale: The number must be finite"),
        (b"\xc1", "The message is not msgpack"),
        (b"", "The message is not msgpack"),
        (msgpack.packb({"prompt": "x"})[:-1], "The message is not msgpack"),
        (msgpack.packb("prompt"), "The message must be a map"),
        (msgpack.packb({b"prompt": "x"}), "The message is not msgpack: the keys of a map must be text"),
        (msgpack.packb({7: "x"}), "The message is not msgpack"),
        (b"\x81\xa1a" + b"\x91" * 200 + b"\xc0", "nested deeper"),
        ("{", "The body is not JSON"),
        ("[]", "The body must be a JSON object"),
    ],
)
async def test_a_wrong_message_is_an_error_and_the_connection_goes_on(
    message: Any, reason: str, place: Place
) -> None:
    async with connected(place) as socket:
        error = await ask(socket, message)
        assert (error["type"], error["error"]) == ("x-fal-error", "VALIDATION_ERROR")
        assert reason in error["reason"] and error["detail"]
        assert (await ask(socket, PROMPT))["prompt"] == "a cat"


async def test_a_request_that_fails_is_an_error(place: Place) -> None:
    place.model.outcome = lambda job: JobResult.failure(InternalError("The model broke."))
    async with connected(place) as socket:
        error = await ask(socket, PROMPT)
    assert (error["error"], error["reason"]) == ("INTERNAL_SERVER_ERROR", "The model broke.")


async def test_a_message_has_a_largest_size(tmp_path: Path) -> None:
    async with gateway_at_work(tmp_path, max_body_bytes=1000) as place, connected(place) as socket:
        assert (await ask(socket, PROMPT | {"x": "x" * 1000}))["error"] == "REQUEST_TOO_LARGE"


# --- messages that come too fast, and callers that leave ---


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("", [0, 4, 5]),  # the first, which runs, and the newest two
        ("?max_buffering=1", [0, 5]),
        ("?max_buffering=60", [0, 1, 2, 3, 4, 5]),
    ],
)
async def test_of_what_waits_the_newest_are_kept(query: str, kept: list[int], place: Place) -> None:
    place.model.open.clear()
    async with connected(place, query) as socket:
        await socket.send(msgpack.packb(PROMPT | {"seed": 0}))
        await place.model.began.acquire()
        for seed in range(1, 6):
            await socket.send(msgpack.packb(PROMPT | {"seed": seed}))
        for _ in range(6 - len(kept)):
            assert (await receive(socket))["type"] == "x-fal-message"
        place.model.open.set()
        assert [(await receive(socket))["seed"] for _ in kept] == kept


@pytest.mark.parametrize("value", ["0", "61", "-1", "x", "", "999999999999"])
async def test_a_malformed_buffer_is_refused(value: str, place: Place) -> None:
    async with connected(place, f"?max_buffering={value}") as socket:
        assert "max_buffering" in (await receive(socket))["reason"]


async def test_a_caller_that_leaves_cancels_its_request(place: Place) -> None:
    place.model.open.clear()
    async with connected(place) as socket:
        await socket.send(msgpack.packb(PROMPT))
        await place.model.began.acquire()
    await asyncio.wait_for(place.model.stopped.wait(), 10)


async def test_a_connection_without_messages_is_closed_in_fal_s_words(tmp_path: Path) -> None:
    async with gateway_at_work(tmp_path, realtime_idle_s=0.05) as place, connected(place) as socket:
        frame = await receive(socket)
        assert (frame["type"], frame["error"]) == ("x-fal-error", "TIMEOUT") and frame["reason"]
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1000


async def test_a_connection_is_not_idle_while_its_request_runs(tmp_path: Path) -> None:
    async with gateway_at_work(tmp_path, realtime_idle_s=2) as place, connected(place) as socket:
        place.model.open.clear()
        await socket.send(msgpack.packb(PROMPT))
        await place.model.began.acquire()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(socket), 2.5)
        place.model.open.set()
        assert (await receive(socket))["prompt"] == "a cat"


# --- who is refused ---


@pytest.mark.parametrize("shown", ["", "nonsense", "other app", "other key", "expired"])
async def test_a_token_that_does_not_count_makes_the_client_fetch_another(
    shown: str, place: Place, alice: httpx.AsyncClient
) -> None:
    texts = {
        "other app": await token(alice, "flux-lora"),
        "other key": Keys(parse("alice:guess")).issue("alice", ["flux"], 120),
        "expired": Keys(parse(ALICE)).issue("alice", ["flux"], 0),
    }
    async with connected(place, f"?fal_jwt_token={texts.get(shown, shown)}", key=None) as socket:
        frame = await receive(socket)
        assert (frame["status"], frame["error"], frame["type"]) == ("error", "Unauthorized", "x-fal-error")
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008


async def test_a_token_that_counts_opens(place: Place, alice: httpx.AsyncClient) -> None:
    async with connected(place, f"?fal_jwt_token={await token(alice)}", key=None) as socket:
        assert (await ask(socket, PROMPT))["prompt"] == "a cat"


async def test_a_key_opens_as_well(place: Place) -> None:
    async with connected(place, key=BOB) as socket:
        assert (await ask(socket, PROMPT))["prompt"] == "a cat"


@pytest.mark.parametrize("key", ["bob:guess", None])
async def test_a_wrong_key_is_told(key: str | None, place: Place) -> None:
    async with connected(place, key=key) as socket:
        frame = await receive(socket)
        assert (frame["error"], frame["type"]) == ("Unauthorized", "x-fal-error")
        assert frame["reason"]


@pytest.mark.parametrize("endpoint", ["fal-ai/nope", "fal-ai/flux/nope", "fal-ai/flux"])
async def test_an_unknown_endpoint_is_told_once(endpoint: str, place: Place) -> None:
    async with connected(place, endpoint=endpoint) as socket:
        frame = await receive(socket)
        assert (frame["type"], frame["error"]) == ("x-fal-error", "NOT_FOUND")
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1000


@pytest.mark.parametrize("path", ["/queue/fal-ai/flux/dev", "/rest/tokens/", "/", "/api/fal/proxy"])
async def test_no_other_path_takes_a_websocket(path: str, place: Place) -> None:
    url = place.url.replace("http", "ws", 1) + path
    with pytest.raises(Exception, match="403"):
        async with connect(url, additional_headers={"authorization": f"Key {ALICE}"}):
            pass


async def test_a_host_of_fal_s_leads_there(place: Place) -> None:
    url = f"ws://fal.run/{ENDPOINT}/realtime"
    host, port = place.url.removeprefix("http://").split(":")
    headers = {"authorization": f"Key {ALICE}"}
    async with connect(url, host=host, port=int(port), additional_headers=headers) as socket:
        assert (await ask(socket, PROMPT))["prompt"] == "a cat"
