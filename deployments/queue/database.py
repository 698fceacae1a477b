"""What the queue needs of a database."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from schemas.errors import StoreDown

T = TypeVar("T")
Operation = Callable[[Connection], T]


class Database(ABC):
    """Transactions, and a bell that rings when another process has committed one.

    An operation is a plain function of a connection. It may run more than once before its result
    counts, so it must have no effect but on the connection. Where the database itself
    fails, StoreDown is raised; where it fails at a commit, that may have been kept or not.
    """

    @abstractmethod
    async def write(self, operation: Operation[T]) -> T:
        """Run in a transaction. Returns once the commit is on disk; raises what the operation raised."""

    @abstractmethod
    async def read(self, operation: Operation[T]) -> T:
        """Run on a consistent view that may not be written."""

    @abstractmethod
    async def changed(self, timeout_s: float) -> None:
        """Wait for a commit by another process, a `wake` in this one, or for `timeout_s`.

        A commit that fell between two calls is not missed.
        """

    @abstractmethod
    def wake(self) -> None:
        """Make `changed` return in this process, as if another had committed."""

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether writes still have a chance."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what was accepted and release everything."""


def down(error: Exception) -> StoreDown:
    """What a caller gets where the database failed: with the cause, which whoever takes it at last logs."""
    failure = StoreDown("The queue cannot be reached at this moment; try again.")
    failure.__cause__ = error
    return failure
