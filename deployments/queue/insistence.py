"""Writes that must not be lost because the database is away for a while."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from deployments import logs
from schemas.errors import StoreClosed, StoreDown

logger = logging.getLogger(__name__)

PAUSE_S = 1.0  # between two tries


async def insist(write: Callable[[], Awaitable[bool]]) -> bool:
    """Repeat a write until the database takes it; the log has one line of that. A fence or the number of an
    attempt must keep it harmless if it is late. Raises StoreClosed."""
    is_told = False
    while True:
        try:
            return await write()
        except StoreClosed:
            raise
        except StoreDown as error:
            if not is_told:
                logger.error("what a worker or a receiver said cannot be kept yet: %s", logs.why(error))
            is_told = True
            await asyncio.sleep(PAUSE_S)
