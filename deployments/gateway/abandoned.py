"""Requests whose callers have left."""

import asyncio
import contextvars
import logging
from typing import Any

from deployments.gateway.gateway import Gateway
from schemas.jobs import Job

logger = logging.getLogger(__name__)

_cancelling: set[asyncio.Task[Any]] = set()  # the loop itself holds tasks only weakly


def abandon(gateway: Gateway, job: Job) -> None:
    """Cancel a request, outliving the call that notices that nobody waits for it."""
    logger.info("the caller of %s left; cancelling it", job.request_id)
    task = asyncio.get_running_loop().create_task(
        gateway.cancel(job.request_id, job.tenant), context=contextvars.Context()
    )
    _cancelling.add(task)
    task.add_done_callback(_cancelling.discard)
