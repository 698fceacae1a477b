"""Calls that come again: under a key, blindly after a connection broke, or because they took too long."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fal_client
import fal_client.client
import httpx
import pytest

from schemas.errors import InternalError, WorkerLost
from schemas.jobs import CancelOutcome, JobResult
from tests.gateway.conftest import ALICE, BOB
from tests.support.gateway import Place, gateway_at_work
from tests.support.jobs import ENDPOINT

APP = "fal-ai/flux"
PROMPT: dict[str, Any] = {"prompt": "a cat"}
KEY = {"idempotency-key": "order-66"}


@pytest.fixture
def grace_s() -> float:
    """How long a run may take before spaces are sent."""
    return 60.0


@pytest.fixture
async def place(tmp_path: Path, grace_s: float) -> AsyncIterator[Place]:
    """A gateway that waits two seconds for a call to come again. Its model stands at a gate."""
    keys = f"{ALICE} {BOB}"
    async with gateway_at_work(tmp_path, keys=keys, run_grace_s=grace_s, linger_s=2) as place:
        yield place


HASTY = pytest.mark.parametrize("grace_s", [0.2])


async def count(alice: httpx.AsyncClient) -> int:
    """How many requests alice has."""
    return len((await alice.get("/v1/models/requests")).json()["items"])


async def error_type(alice: httpx.AsyncClient, request_id: str) -> str | None:
    """How a request ended, once it has."""
    async with alice.stream("GET", f"/queue/{APP}/requests/{request_id}/status/stream") as answer:
        lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
    found: str | None = json.loads(lines[-1].removeprefix("data: ")).get("error_type")
    return found


# --- the same key ---


async def test_a_submit_under_a_known_key_is_answered_with_its_request(alice: httpx.AsyncClient) -> None:
    first, second = [await alice.post(f"/queue/{ENDPOINT}", json=PROMPT, headers=KEY) for _ in range(2)]
    assert first.json() == second.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert await count(alice) == 1


async def test_submits_at_once_under_one_key_are_one(alice: httpx.AsyncClient) -> None:
    calls = [alice.post(f"/queue/{ENDPOINT}", json=PROMPT, headers=KEY) for _ in range(8)]
    answers = await asyncio.gather(*calls)
    assert len({answer.json()["request_id"] for answer in answers}) == 1


async def test_a_run_under_a_known_key_has_its_answer(place: Place, alice: httpx.AsyncClient) -> None:
    place.model.open.set()
    first, second = [await alice.post(f"/run/{ENDPOINT}", json=PROMPT, headers=KEY) for _ in range(2)]
    assert first.json() == second.json()
    assert first.headers["x-fal-request-id"] == second.headers["x-fal-request-id"]


async def test_a_key_is_its_tenant_s_own(alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    ids = {
        (await http.post(f"/queue/{ENDPOINT}", json=PROMPT, headers=KEY)).json()["request_id"]
        for http in (alice, bob)
    }
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (ENDPOINT, PROMPT | {"seed": 1}),
        ("fal-ai/flux-lora/image-to-image", PROMPT | {"image_url": "https://x/y"}),
    ],
)
async def test_a_key_is_for_one_input(
    endpoint: str, fields: dict[str, Any], alice: httpx.AsyncClient
) -> None:
    await alice.post(f"/queue/{ENDPOINT}", json=PROMPT, headers=KEY)
    answer = await alice.post(f"/queue/{endpoint}", json=fields, headers=KEY)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "idempotency_key_reused")
    assert await count(alice) == 1


async def test_what_was_cancelled_or_lost_may_be_tried_again(place: Place, alice: httpx.AsyncClient) -> None:
    first = (await alice.post(f"/queue/{ENDPOINT}", json=PROMPT, headers=KEY)).json()
    await alice.put(first["cancel_url"])
    assert await error_type(alice, first["request_id"]) == "client_cancelled"
    place.model.open.set()
    draw, place.model.outcome = place.model.outcome, lambda job: JobResult.failure(WorkerLost("lost"))
    second = await alice.post(f"/run/{ENDPOINT}", json=PROMPT, headers=KEY)
    assert second.status_code == 503
    place.model.outcome = draw
    third = await alice.post(f"/run/{ENDPOINT}", json=PROMPT, headers=KEY)
    assert third.status_code == 200
    assert await count(alice) == 3


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
async def test_a_malformed_key_is_refused(key: str, alice: httpx.AsyncClient) -> None:
    answer = await alice.post(f"/queue/{ENDPOINT}", json=PROMPT, headers={"idempotency-key": key})
    assert answer.status_code == 400 and "Idempotency-Key" in answer.json()["message"]


# --- a connection that broke ---


async def broken_off(place: Place, path: str, key: str = ALICE, fields: Any = PROMPT) -> None:
    """Send a POST, and leave once the model has begun with it."""
    host, port = place.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(fields)
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Key {key}\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
    await place.model.began.acquire()
    writer.close()
    await writer.wait_closed()


async def test_a_run_that_comes_again_at_once_finds_its_request(
    place: Place, alice: httpx.AsyncClient
) -> None:
    await broken_off(place, f"/run/{ENDPOINT}")
    place.model.open.set()
    answer = await alice.post(f"/run/{ENDPOINT}", json=PROMPT)
    assert answer.json()["prompt"] == "a cat"
    assert await error_type(alice, answer.headers["x-fal-request-id"]) is None
    assert await count(alice) == 1


@asynccontextmanager
async def breaking(place: Place) -> AsyncIterator[str]:
    """The URL of the same server behind a connection whose first call breaks once the model has begun."""
    host, port = place.url.removeprefix("http://").split(":")
    calls = 0

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        there, back = await asyncio.open_connection(host, int(port))
        carrying = [asyncio.create_task(carry(reader, back)), asyncio.create_task(carry(there, writer))]
        if calls == 1:
            await place.model.began.acquire()
            back.transport.abort()
            writer.transport.abort()
        await asyncio.wait(carrying)

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        yield "http://{}:{}".format(*server.sockets[0].getsockname())
        server.close()


async def test_fal_s_client_tries_again_by_itself_and_there_is_one_request(
    place: Place, alice: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with breaking(place) as url:
        monkeypatch.setattr(fal_client.client, "RUN_URL_FORMAT", f"{url}/run/")
        client = fal_client.AsyncClient(key=ALICE)
        running = asyncio.create_task(client.run(ENDPOINT, PROMPT))
        while not place.model.order:
            await place.queue.changed(0.1)
        place.model.open.set()
        assert (await running)["prompt"] == "a cat"
        await (await client._client).aclose()
    assert await count(alice) == 1


async def test_a_run_that_does_not_come_again_is_cancelled(place: Place, alice: httpx.AsyncClient) -> None:
    await broken_off(place, f"/run/{ENDPOINT}")
    await asyncio.wait_for(place.model.stopped.wait(), 10)
    place.model.open.set()
    assert (await alice.post(f"/run/{ENDPOINT}", json=PROMPT)).status_code == 200
    assert await count(alice) == 2


@pytest.mark.parametrize(("key", "fields"), [(BOB, PROMPT), (ALICE, PROMPT | {"seed": 1})])
async def test_another_call_joins_nothing(
    key: str, fields: dict[str, Any], place: Place, alice: httpx.AsyncClient
) -> None:
    await broken_off(place, f"/run/{ENDPOINT}", key, fields)
    place.model.open.set()
    answer = await alice.post(f"/run/{ENDPOINT}", json=PROMPT)
    assert answer.status_code == 200
    assert await count(alice) == (1 if key == BOB else 2)


async def test_two_callers_at_once_want_two_pictures(place: Place, alice: httpx.AsyncClient) -> None:
    calls = [asyncio.create_task(alice.post(f"/run/{ENDPOINT}", json=PROMPT)) for _ in range(2)]
    for _ in calls:
        await place.model.began.acquire()
    place.model.open.set()
    ids = {(await call).headers["x-fal-request-id"] for call in calls}
    assert len(ids) == 2


# --- what takes long ---


@HASTY
async def test_a_long_run_begins_with_spaces(place: Place, alice: httpx.AsyncClient) -> None:
    async with alice.stream("POST", f"/run/{ENDPOINT}", json=PROMPT) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        chunks = answer.aiter_raw()
        assert await anext(chunks) == b" "
        place.model.open.set()
        rest = b"".join([chunk async for chunk in chunks])
    assert json.loads(rest)["prompt"] == "a cat"
    assert await error_type(alice, answer.headers["x-fal-request-id"]) is None


@HASTY
async def test_a_long_run_that_fails_breaks_off_and_says_why_when_it_comes_again(
    place: Place, alice: httpx.AsyncClient
) -> None:
    place.model.outcome = lambda job: JobResult.failure(InternalError("The model broke."))
    with pytest.raises(httpx.RemoteProtocolError):
        async with alice.stream("POST", f"/run/{ENDPOINT}", json=PROMPT) as answer:
            place.model.open.set()
            await answer.aread()
    again = await alice.post(f"/run/{ENDPOINT}", json=PROMPT)
    assert (again.status_code, again.json()["message"]) == (500, "The model broke.")
    assert again.headers["x-fal-request-id"] == answer.headers["x-fal-request-id"]


@HASTY
async def test_a_long_run_whose_caller_leaves_is_cancelled(place: Place, alice: httpx.AsyncClient) -> None:
    async with alice.stream("POST", f"/run/{ENDPOINT}", json=PROMPT) as answer:
        await anext(answer.aiter_raw())
    await asyncio.wait_for(place.model.stopped.wait(), 10)
    outcome = await place.queue.cancel(answer.headers["x-fal-request-id"], "alice")
    assert outcome in (CancelOutcome.REQUESTED, CancelOutcome.ALREADY_COMPLETED)
    assert await error_type(alice, answer.headers["x-fal-request-id"]) == "client_cancelled"


async def test_a_quick_failure_keeps_its_status(place: Place, alice: httpx.AsyncClient) -> None:
    place.model.open.set()
    place.model.outcome = lambda job: JobResult.failure(InternalError("The model broke."))
    assert (await alice.post(f"/run/{ENDPOINT}", json=PROMPT)).status_code == 500
