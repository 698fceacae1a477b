"""Hears over LISTEN/NOTIFY that another process has committed something. The sibling of the doorbell.

A lost notification costs a moment, never a request: whoever waits also looks by itself now and then.
"""

import asyncio
import contextvars
import logging
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import psycopg

from deployments.queue.bell import Bell

logger = logging.getLogger(__name__)

CHANNEL = "darkroom_queue"
RECONNECT_S = 1.0


class Listener(Bell):
    """One process's ear on one database, on a connection of its own. Belongs to the running event loop."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.name = uuid4().hex  # what this process's own notifications carry: it does not hear itself
        self._parameters = parameters
        super().__init__()
        # in a clean context: it outlives the request that opened it
        self._task = asyncio.get_running_loop().create_task(self._listen(), context=contextvars.Context())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _listen(self) -> None:
        is_told = False
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    **self._parameters, autocommit=True
                ) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    self._rung.set()  # whatever was committed meanwhile
                    is_told = False
                    async for notification in connection.notifies():
                        if notification.payload != self.name:
                            self._rung.set()
            except (psycopg.Error, OSError) as error:
                if not is_told:
                    logger.warning("the other processes' commits are not heard of at once: %s", error)
                is_told = True
            await asyncio.sleep(RECONNECT_S)
