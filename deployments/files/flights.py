"""Work that several callers wait for, done once."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Report = Callable[[str], None]  # takes lines for people


class Flights(Generic[T]):
    """What is under way, by key."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    async def join(self, key: str, work: Callable[[Report], Coroutine[Any, Any, T]], report: Report) -> T:
        """Wait for the one work of a key, beginning it if there is none. Its lines go to all who wait.

        It ends early when the last of them leaves, and what it raises is raised to each.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(work)
        try:
            return await flight.join(report)
        finally:
            if flight.is_left and self._flights.get(key) is flight:
                del self._flights[key]


class _Flight(Generic[T]):
    def __init__(self, work: Callable[[Report], Coroutine[Any, Any, T]]) -> None:
        self._reports: list[Report] = []
        self._task = asyncio.create_task(work(self._tell))

    @property
    def is_left(self) -> bool:
        return not self._reports

    async def join(self, report: Report) -> T:
        self._reports.append(report)
        try:
            return await asyncio.shield(self._task)
        finally:
            self._reports.remove(report)
            if self.is_left:
                self._task.cancel()

    def _tell(self, line: str) -> None:
        for report in self._reports:
            report(line)
