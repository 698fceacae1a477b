"""A byte-bounded cache in RAM: what was used last stays longest."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


class Cache(Generic[V]):
    """Values by name, together at most `capacity` bytes; one larger than that is not kept."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[str, V] = OrderedDict()
        self._lock = Lock()

    def get(self, name: str, load: Callable[[], V]) -> V:
        """The value of a name, loaded if it is not here. Two threads may load the same one."""
        value = self.find(name)
        if value is None:
            value = load()
            self.keep(name, value)
        return value

    def find(self, name: str) -> V | None:
        with self._lock:
            if name in self._values:
                self._values.move_to_end(name)
            return self._values.get(name)

    def keep(self, name: str, value: V) -> None:
        with self._lock:
            self._values[name] = value
            self._values.move_to_end(name)
            while self.nbytes > self._capacity:
                self._values.popitem(last=False)

    @property
    def names(self) -> list[str]:
        """What is kept."""
        with self._lock:
            return list(self._values)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self._values.values())
