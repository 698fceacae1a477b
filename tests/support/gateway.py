"""The gateway on a port of this machine: a real queue, dispatcher and file store, and a model of ours."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from deployments.dispatcher import Dispatcher, ModelHandle
from deployments.files.store import FileStore, open_files
from deployments.gateway import http
from deployments.gateway.gateway import Gateway
from deployments.gateway.keys import LOOK_S, Keys, parse
from deployments.gateway.throttle import Throttle
from deployments.queue import Audit, KeyTable, Queue, open_audit, open_keys, open_queue
from pipelines import registry
from schemas.jobs import Job, JobResult
from schemas.settings import Catalogue, FrontSettings
from tests.support.canaries import leaks, lookout, secrets_of
from tests.support.jobs import ScriptedModel

Connect = Callable[[str], ModelHandle]

PICTURE = b"\xff\xd8\xff a picture"


@dataclass
class Place:
    """A running gateway."""

    url: str
    gateway: Gateway
    files: FileStore
    queue: Queue
    model: ScriptedModel
    table: KeyTable  # what it says is known at the next call
    audit: Audit
    app: ASGIApp


@asynccontextmanager
async def gateway_at_work(
    folder: Path,
    *,
    keys: str = "",
    connect: Connect | None = None,
    queue_url: str | None = None,
    **settings: Any,
) -> AsyncIterator[Place]:
    """A gateway that serves every endpoint. Its model draws `PICTURE` once its gate is open, unless another
    is connected. At the end no secret of its keys is in any answer, log line or file (t23)."""
    files_url, queue_url = f"file://{folder}/files", queue_url or f"sqlite:///{folder}/queue.sqlite3"
    front = FrontSettings(files_url=files_url, queue_url=queue_url, **settings)
    catalogue = Catalogue.model_validate({"models": {"every": {"endpoints": list(registry.ENDPOINTS)}}})
    queue, files, model = open_queue(queue_url, front.lease), open_files(files_url), ScriptedModel()
    model.outcome = await _drawing(files)
    dispatcher = Dispatcher(
        queue, front.lease, connect or model.connect, lambda each: registry.endpoint(each).input_type()
    )
    gateway = Gateway(queue, files, front)
    gateway.configure(catalogue)
    await dispatcher.configure(catalogue)
    table, audit = open_keys(queue_url), open_audit(queue_url)
    throttle, ticks = Throttle(front.bad_keys_per_minute), count(0, LOOK_S).__next__
    known = Keys(parse(keys), table=table, throttle=throttle, ticks=ticks)
    app = http.build(gateway, known, _always, lambda: {"keys": []})
    secrets = secrets_of(keys)
    with lookout(secrets) as out:
        async with listening(out.watching(app)) as url:
            yield Place(url, gateway, files, queue, model, table, audit, app)
    await dispatcher.close()
    for each in (queue, table, audit):
        await each.close()
    assert out.heard + leaks(secrets, [folder]) == []


async def _drawing(files: FileStore) -> Any:
    """An outcome: as many pictures as are asked for, all the same."""
    key = await files.save(PICTURE, "image/jpeg")

    def outcome(job: Job) -> JobResult:
        count = job.input.get("num_images", 1)
        image = {
            "url": files.url(key, job.base_url),
            "width": 64,
            "height": 48,
            "content_type": "image/jpeg",
            "file_name": "picture.jpg",
            "file_size": len(PICTURE),
        }
        output = {
            "images": [image] * count,
            "timings": {"inference": 0.5},
            "seed": job.input.get("seed", 1),
            "has_nsfw_concepts": [False] * count,
            "prompt": job.input["prompt"],
        }
        told = registry.endpoint(job.endpoint_id).schema().Output(**output)
        return JobResult.success(told.model_dump(mode="json"), 0.5)

    return outcome


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """The URL of an application, on a port of this machine, until the end of the block."""
    config = uvicorn.Config(app, lifespan="off", log_config=None, ws="websockets-sansio", proxy_headers=False)
    server = uvicorn.Server(config)
    # Of a socket that does not say TCP asyncio sends no small answers at once: 40 ms each.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # whoever connects before the server accepts waits
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await serving


async def _always() -> bool:
    return True
