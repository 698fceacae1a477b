"""Requests whose callers have left, or may leave."""

import asyncio
import contextvars
import logging
from collections.abc import Coroutine
from typing import Any

from starlette.requests import Request

from deployments.gateway.gateway import Gateway
from schemas.jobs import Job

logger = logging.getLogger(__name__)

_cancelling: set[asyncio.Task[Any]] = set()  # the loop itself holds tasks only weakly


async def while_connected(
    request: Request, gateway: Gateway, job: Job, work: Coroutine[Any, Any, Any]
) -> Any:
    """The outcome of `work`, or None if the client left before it; then the job is cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            abandon(gateway, job)


async def _disconnect(request: Request) -> None:
    """Wait until the client is gone. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def abandon(gateway: Gateway, job: Job) -> None:
    """Cancel a request, outliving the call that notices that nobody waits for it."""
    logger.info("the caller of %s left; cancelling it", job.request_id)
    task = asyncio.get_running_loop().create_task(
        gateway.cancel(job.request_id, job.tenant), context=contextvars.Context()
    )
    _cancelling.add(task)
    task.add_done_callback(_cancelling.discard)
