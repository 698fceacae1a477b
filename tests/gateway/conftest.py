from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.support.gateway import Place, gateway_at_work

ALICE = "alice:s3cret"
BOB = "bob:hunter2"


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    """A gateway with keys, whose model answers at once."""
    async with gateway_at_work(tmp_path, keys=f"{ALICE} {BOB}") as place:
        place.model.open.set()
        yield place


@pytest.fixture
async def alice(place: Place) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Key {ALICE}"}
    async with httpx.AsyncClient(base_url=place.url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
async def bob(place: Place) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Key {BOB}"}
    async with httpx.AsyncClient(base_url=place.url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
async def stranger(place: Place) -> AsyncIterator[httpx.AsyncClient]:
    """A caller without a key."""
    async with httpx.AsyncClient(base_url=place.url, timeout=30) as client:
        yield client
