"""A program: asks one endpoint of this tree for pictures, over HTTP, of a real worker, and without Ray.

    python -m tests.support.asking FOLDER ENDPOINT FIELDS…

Prints a JSON line for each: the status, the body. The last picture is put into the folder.
"""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx

from deployments.files.store import open_files
from deployments.worker.worker import Worker
from pipelines import zoo
from schemas.jobs import Backlog, Job, Update
from schemas.settings import ModelSettings
from tests.support.gateway import gateway_at_work


class Direct:
    """A ModelHandle that is the worker itself."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def generate(self, job: Job, backlog: Backlog) -> AsyncGenerator[Update]:
        async for update in self._worker.generate(job):
            yield update

    async def prefetch(self, job: Job) -> None:
        self._worker.prefetch(job)


async def ask(folder: Path, endpoint: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    model = str(zoo.locate("flux", folder / "zoo"))
    settings = ModelSettings(model=model, endpoints=(endpoint,), max_sequence_length=32, cpu_threads=1)
    worker = Worker(settings, open_files(f"file://{folder}/files"))
    told = []
    async with gateway_at_work(folder, connect=lambda name: Direct(worker)) as place:
        async with httpx.AsyncClient(base_url=place.url, timeout=60) as client:
            for fields in requests:
                answer = await client.post(f"/run/{endpoint}", json=fields)
                told.append({"status": answer.status_code, "body": answer.json()})
                for image in told[-1]["body"].get("images", []):
                    (folder / "picture").write_bytes((await client.get(image["url"])).content)
            for path in (f"/openapi/{endpoint}", f"/playground/{endpoint}"):
                (await client.get(path)).raise_for_status()
    worker.close()
    return told


if __name__ == "__main__":
    folder, endpoint, *requests = sys.argv[1:]
    for told in asyncio.run(ask(Path(folder), endpoint, list(map(json.loads, requests)))):
        print(json.dumps(told))
