"""How far a job's samples are: the bridge from the engine's thread to the event loop."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from pipelines.engine.sample import Sample


class Progress:
    """Listens to the samples of one job on the engine's thread, speaks on the event loop."""

    def __init__(self, samples: Sequence[Sample], loop: asyncio.AbstractEventLoop) -> None:
        self.total = max((sample.plan.steps for sample in samples), default=0)
        self._samples = samples
        self._loop = loop
        self._running = len(samples)
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    def stepped(self, sample: Sample) -> None:
        self._loop.call_soon_threadsafe(self._changed.set)

    def ended(self, sample: Sample, error: BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._count, error)

    def _count(self, error: BaseException | None) -> None:
        self._running -= 1
        self._error = self._error or error
        self._changed.set()

    async def steps(self) -> AsyncGenerator[int]:
        """Each step that all samples have done, 1 … total. Raises what a sample failed with."""
        told = 0
        while self._error is None and (self._running or told < self.total):
            await self._changed.wait()
            self._changed.clear()
            done = self.total - max(sample.plan.steps - sample.step for sample in self._samples)
            for step in range(told + 1, done + 1):
                yield step
            told = max(told, done)
        if self._error is not None:
            raise self._error
