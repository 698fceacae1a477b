"""A hub on a socket, and a server that fetches from it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.hub import Hub, serving
from tests.unit.deployments.places import Place


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with serving() as hub:
        yield hub


@pytest.fixture
def place(tmp_path: Path, hub: Hub) -> Place:
    return Place(tmp_path, hub.url)
