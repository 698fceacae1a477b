"""A byte-bounded cache in RAM: what was used last stays longest."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)
N = TypeVar("N", bound=Hashable)


class Cache(Generic[N, V]):
    """Values by name, together at most `capacity` bytes; one larger than that is not kept.

    May be used from any thread. Whoever gets a value shares it with others, and must not change it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[N, V] = OrderedDict()
        self._nbytes = 0
        self._loading: dict[N, Future[V]] = {}
        self._lock = Lock()

    def get(self, name: N, load: Callable[[], V]) -> V:
        """The value of a name, loaded if it is not here: once, whoever else asks for it meanwhile.

        Raises what `load` raises. Those who waited for a load that failed then load themselves.
        """
        while True:
            with self._lock:
                if (value := self._found(name)) is not None:
                    return value
                if (others := self._loading.get(name)) is None:
                    mine = self._loading[name] = Future()
                    break
            if others.exception() is None:
                return others.result()
        return self._load(name, load, mine)

    def find(self, name: N) -> V | None:
        with self._lock:
            return self._found(name)

    def keep(self, name: N, value: V) -> None:
        with self._lock:
            self._put(name, value)

    @property
    def names(self) -> list[N]:
        """What is kept."""
        with self._lock:
            return list(self._values)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._nbytes = 0

    def _load(self, name: N, load: Callable[[], V], told: "Future[V]") -> V:
        try:
            value = load()
        except BaseException as error:
            with self._lock:
                del self._loading[name]
            told.set_exception(error)
            raise
        with self._lock:
            self._put(name, value)
            del self._loading[name]
        told.set_result(value)
        return value

    def _found(self, name: N) -> V | None:
        if name in self._values:
            self._values.move_to_end(name)
        return self._values.get(name)

    def _put(self, name: N, value: V) -> None:
        if (old := self._values.pop(name, None)) is not None:
            self._nbytes -= old.nbytes
        self._values[name] = value
        self._nbytes += value.nbytes
        while self._nbytes > self._capacity:
            _, oldest = self._values.popitem(last=False)
            self._nbytes -= oldest.nbytes
