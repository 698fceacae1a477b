"""The thread that writes. A commit costs a sync of milliseconds, so operations share it."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import Connection

from deployments import crash
from deployments.queue.database import Operation
from schemas.errors import StoreClosed, StoreDown

T = TypeVar("T")
Pending = tuple[Operation[Any], Future[Any]]
Outcome = tuple[Any, Exception | None]  # a result, or why there is none
Work = Callable[[Connection], list[Outcome]]

GROUP_LIMIT = 256  # operations in one commit


class GroupWriter:
    """Runs all operations that wait at a moment in one transaction, in the order they came (group commit).

    `transact` runs a function in a transaction. It raises what the function raised, and StoreDown where
    to try again is of no use. `explain` gives the error that a caller gets for one that was raised.
    """

    def __init__(
        self, transact: Callable[[Work], list[Outcome]], explain: Callable[[Exception], Exception]
    ) -> None:
        self._transact = transact
        self._explain = explain
        self._pending: SimpleQueue[Pending | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write_groups, name="queue-writer", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def write(self, operation: Operation[T]) -> T:
        """See Database.write."""
        if not self.is_alive:
            raise StoreClosed("The queue is closed.")
        done: Future[T] = Future()
        self._pending.put((operation, done))
        return await asyncio.wrap_future(done)

    async def close(self) -> None:
        """Finish what was accepted."""
        self._pending.put(None)
        await asyncio.to_thread(self._thread.join)

    def _write_groups(self) -> None:
        while group := self._next_group():
            crash.point("group.gathered")
            outcomes = self._commit([operation for operation, _ in group])
            crash.point("group.committed")
            for (_, done), outcome in zip(group, outcomes, strict=True):
                _settle(done, outcome)
                crash.point("group.settled")

    def _next_group(self) -> list[Pending]:
        """What waits now, at least one; empty at the end."""
        first = self._pending.get()
        group = [] if first is None else [first]
        while group and len(group) < GROUP_LIMIT:
            try:
                following = self._pending.get_nowait()
            except Empty:
                break
            if following is None:
                self._pending.put(None)  # the end comes after this group
                break
            group.append(following)
        return group

    def _commit(self, operations: Sequence[Operation[Any]]) -> list[Outcome]:
        """One transaction for all. If an operation raises, they run again, each one undone by itself."""
        try:
            return self._run(operations, lambda connection, operation: (operation(connection), None))
        except Exception as error:  # noqa: BLE001 - the top of the writer's loop; the callers get it
            if len(operations) == 1 or isinstance(error, StoreDown):
                return [(None, self._explain(error)) for _ in operations]
        crash.point("group.undone")
        try:
            return self._run(operations, self._attempt)
        except Exception as error:  # noqa: BLE001 - as above
            return [(None, self._explain(error)) for _ in operations]

    def _run(
        self,
        operations: Sequence[Operation[Any]],
        run_one: Callable[[Connection, Operation[Any]], Outcome],
    ) -> list[Outcome]:
        def work(connection: Connection) -> list[Outcome]:
            crash.point("group.begun")
            outcomes = [run_one(connection, operation) for operation in operations]
            crash.point("group.ran")
            return outcomes

        return self._transact(work)

    def _attempt(self, connection: Connection, operation: Operation[Any]) -> Outcome:
        """Undone if it raises, without the rest of the transaction."""
        try:
            with connection.begin_nested():
                return operation(connection), None
        except Exception as error:  # its caller gets it
            if connection.invalidated:
                raise
            return None, self._explain(error)


def _settle(done: "Future[Any]", outcome: Outcome) -> None:
    if not done.set_running_or_notify_cancel():
        return  # its caller has gone
    result, error = outcome
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)
