"""Requests whose callers have left, or may leave."""

import asyncio
import contextvars
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from deployments.gateway.gateway import Gateway
from schemas.jobs import Job

T = TypeVar("T")

logger = logging.getLogger(__name__)

_cancelling: set[asyncio.Task[Any]] = set()  # the loop itself holds tasks only weakly


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The outcome of `work`, or None if the client left before it. The body must have been read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        working.cancel()


async def _disconnect(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def abandon(gateway: Gateway, job: Job) -> None:
    """Cancel a request, outliving the call that notices that nobody waits for it."""
    logger.info("the caller of %s left; cancelling it", job.request_id)
    task = asyncio.get_running_loop().create_task(
        gateway.cancel(job.request_id, job.tenant), context=contextvars.Context()
    )
    _cancelling.add(task)
    task.add_done_callback(_cancelling.discard)
