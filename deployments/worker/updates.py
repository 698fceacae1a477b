"""A job's events on their way to whoever runs it."""

import asyncio

from schemas.jobs import JobEvent, JobResult


class Updates:
    """Events on their way out of a job, until it ends."""

    def __init__(self) -> None:
        self.filled = asyncio.Event()  # something to take, or the end
        self.ended = asyncio.Event()
        self.has_begun = False
        self._events: list[JobEvent] = []

    def add(self, event: JobEvent) -> None:
        self._events.append(event)
        self.filled.set()

    def end(self, _: "asyncio.Task[JobResult]") -> None:
        self.ended.set()
        self.filled.set()

    def take(self) -> tuple[JobEvent, ...]:
        events, self._events = tuple(self._events), []
        if not self.ended.is_set():
            self.filled.clear()
        return events
