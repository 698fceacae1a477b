"""The queue's own tables, whether the server runs or not."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from deployments import server
from deployments.queue import Audit, KeyTable
from schemas.settings import FrontSettings

T = TypeVar("T")
OpenT = TypeVar("OpenT", KeyTable, Audit)

KEYS_ENV = FrontSettings.model_fields["keys_env"].default


def front(config: Path) -> FrontSettings:
    return server.front_settings(server.load_config(config, None, None))


def in_queue(config: Path, opens: Callable[[str], OpenT], work: Callable[[OpenT], Awaitable[T]]) -> T:
    async def opened(url: str) -> T:
        place = opens(url)
        try:
            return await work(place)
        finally:
            await place.close()

    return asyncio.run(opened(front(config).queue_url))
