"""Small operations on a queue's database, and groups of them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Connection, insert, select

from deployments.queue.database import Database, Operation
from deployments.queue.tables import events

LIMIT_S = 60.0


def note(name: str) -> Any:
    row = {"request_id": name, "kind": "state", "at": 1.0, "payload": None}
    return lambda connection: connection.execute(insert(events), row)


def noted(connection: Connection) -> list[str]:
    return list(connection.scalars(select(events.c.request_id).order_by(events.c.seq)))


@asynccontextmanager
async def grouped(database: Database) -> AsyncIterator[Callable[..., Callable[[], Awaitable[list[Any]]]]]:
    """Holds the writer up, so that what is written meanwhile shares a group; their outcomes come after."""
    began, gate = threading.Event(), threading.Event()

    def holds(connection: Connection) -> None:
        began.set()
        assert gate.wait(LIMIT_S)

    def write(*operations: Operation[Any]) -> Callable[[], Awaitable[list[Any]]]:
        tasks = [asyncio.create_task(database.write(each)) for each in operations]
        return lambda: asyncio.gather(*tasks, return_exceptions=True)

    holder = asyncio.create_task(database.write(holds))
    await asyncio.to_thread(began.wait)
    yield write
    await asyncio.sleep(0)  # each task puts its operation in line
    gate.set()
    await holder
