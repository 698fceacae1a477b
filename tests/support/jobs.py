"""Jobs, clocks and models for tests."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from schemas.jobs import Backlog, Job, JobEvent, JobResult, Logged, Update

ENDPOINT = "fal-ai/flux/dev"
OUTPUT = {
    "images": [],
    "timings": {"inference": 0.5},
    "seed": 1,
    "has_nsfw_concepts": [],
    "prompt": "a cat",
}


def make_job(**fields: Any) -> Job:
    known = {"endpoint_id": ENDPOINT, "model": "flux", "input": {"prompt": "a cat"}}
    return Job(request_id=str(uuid4()), **{**known, **fields})


@dataclass
class Clock:
    """Stands still until it is moved."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class ScriptedModel:
    """A ModelHandle whose jobs stop at a gate until it is opened, and then end as told."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    began: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    spoke: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))  # it told its events
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    events: tuple[JobEvent, ...] = (Logged("step 1/2"), Logged("step 2/2"))
    outcome: Callable[[Job], JobResult] = lambda job: JobResult.success(OUTPUT, 0.5)
    failures: list[Exception] = field(default_factory=list)  # raised first, one a call
    running: int = 0
    most: int = 0  # jobs at once
    order: list[str] = field(default_factory=list)
    backlogs: list[Backlog] = field(default_factory=list)  # beside each job, as it was told
    waited: list[float] = field(default_factory=list)  # seconds, by each job
    traceparents: list[str | None] = field(default_factory=list)  # by each job
    prefetched: list[str] = field(default_factory=list)
    queues: bool = False  # a job waits in the worker before it begins
    is_deaf: bool = False  # a prefetch does not come back
    calling: int = 0  # prefetches under way

    def connect(self, name: str) -> "ScriptedModel":
        return self

    async def generate(self, job: Job, backlog: Backlog) -> AsyncGenerator[Update]:
        self.backlogs.append(backlog)
        self.waited.append(job.waited_s)
        self.traceparents.append(job.traceparent)
        self.running += 1
        self.most = max(self.most, self.running)
        self.order.append(job.request_id)
        self.began.release()
        try:
            if self.failures:
                raise self.failures.pop(0)
            if self.queues:
                yield Update(has_begun=False)
            for event in self.events:
                yield Update((event,))
            self.spoke.release()
            await self.open.wait()
            yield Update((), self.outcome(job))
        except (asyncio.CancelledError, GeneratorExit):
            self.stopped.set()
            raise
        finally:
            self.running -= 1

    async def prefetch(self, job: Job) -> None:
        self.prefetched.append(job.request_id)
        self.calling += 1
        try:
            if self.failures:
                raise self.failures.pop(0)
            if self.is_deaf:
                await asyncio.Event().wait()
        finally:
            self.calling -= 1
