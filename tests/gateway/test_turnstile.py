"""A limit to the runs that one key waits for at once."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import ALICE, BOB
from tests.support.gateway import Place, gateway_at_work
from tests.support.jobs import ENDPOINT

PROMPT: dict[str, Any] = {"prompt": "a cat"}


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with gateway_at_work(tmp_path, keys=f"{ALICE} {BOB}", max_runs=2) as place:
        yield place


async def test_what_goes_beyond_the_limit_is_told_to_come_again(
    place: Place, alice: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    paths = [f"/run/{ENDPOINT}", f"/run/{ENDPOINT}/stream"]
    calls = [asyncio.create_task(alice.post(path, json=PROMPT)) for path in paths]
    for _ in calls:
        await place.model.began.acquire()
    for path in (*paths, "/v1/images/generations"):
        refused = await alice.post(path, json=PROMPT)
        assert refused.status_code == 429
        assert refused.headers["x-fal-error-type"] == "concurrent_requests_limit"
        assert refused.headers["x-fal-needs-retry"] == "1"
        assert refused.headers["x-fal-retryable"] == "true"
    assert (await alice.post(f"/queue/{ENDPOINT}", json=PROMPT)).status_code == 200
    other = asyncio.create_task(bob.post(f"/run/{ENDPOINT}", json=PROMPT))  # has a limit of its own
    place.model.open.set()
    assert [(await call).status_code for call in (*calls, other)] == [200, 200, 200]
    assert (await alice.post(f"/run/{ENDPOINT}", json=PROMPT)).status_code == 200  # there is room again


async def test_refused_and_broken_calls_leave_room(alice: httpx.AsyncClient, place: Place) -> None:
    for _ in range(5):
        assert (await alice.post(f"/run/{ENDPOINT}", json={})).status_code == 422
    async with alice.stream("POST", f"/run/{ENDPOINT}/stream", json=PROMPT) as answer:
        place.model.open.set()
        await answer.aread()
    assert (await alice.post(f"/run/{ENDPOINT}", json=PROMPT)).status_code == 200
