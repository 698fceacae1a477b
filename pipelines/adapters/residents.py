"""Large things beside the model, such as ControlNets: loaded once, kept while there is room."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Lock
from typing import Generic, TypeVar

from schemas.errors import AssetError

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Wanted(Generic[V]):
    """Something to be resident: its size, and how it is loaded."""

    nbytes: int
    load: Callable[[], V]


@dataclass(slots=True)
class _Resident(Generic[V]):
    value: V
    nbytes: int
    pins: int = 0


class Residents(Generic[V]):
    """Values by name, together at most `capacity` bytes. What is held stays; the rest goes oldest first.

    May be used from any thread. One caller at a time takes, so that two who each have a part of what
    they need cannot wait for one another.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._residents: OrderedDict[str, _Resident[V]] = OrderedDict()  # least recently used first
        self._changed = Condition()
        self._taking = Lock()

    @contextmanager
    def holding(self, wanted: Mapping[str, Wanted[V]]) -> Iterator[Mapping[str, V]]:
        """The values, loaded where need be, resident for as long as the block lasts.

        Waits while others hold the room. Raises AssetError when they would not fit into an empty place,
        and whatever a loader raises.
        """
        needed = sum(each.nbytes for each in wanted.values())
        if needed > self._capacity:
            message = f"The files have {needed} bytes together; this server holds {self._capacity} at once."
            raise AssetError(message, "file_too_large", {"max_size": self._capacity})
        held: list[str] = []
        try:
            with self._taking:
                for name, each in wanted.items():
                    self._take(name, each, needed_for=wanted)
                    held.append(name)
            yield {name: self._residents[name].value for name in wanted}
        finally:
            self._give_back(held)

    def check_integrity(self) -> None:
        """Raise AssertionError when the books are wrong."""
        assert self._used <= self._capacity
        assert all(resident.pins >= 0 for resident in self._residents.values())

    @property
    def pins(self) -> int:
        """How many holds are out."""
        return sum(resident.pins for resident in self._residents.values())

    @property
    def _used(self) -> int:
        return sum(resident.nbytes for resident in self._residents.values())

    def _take(self, name: str, wanted: Wanted[V], needed_for: Mapping[str, Wanted[V]]) -> None:
        with self._changed:
            if name not in self._residents:
                self._changed.wait_for(lambda: self._make_room(wanted.nbytes, keep=needed_for))
        if name not in self._residents:  # only a taker adds, and there is one at a time
            self._residents[name] = _Resident(wanted.load(), wanted.nbytes)
        with self._changed:
            self._residents[name].pins += 1
            self._residents.move_to_end(name)

    def _make_room(self, nbytes: int, keep: Mapping[str, Wanted[V]]) -> bool:
        """Evict idle values, those of `keep` last, until `nbytes` fit. False: the rest is held."""
        idle = [name for name, each in self._residents.items() if not each.pins]
        for name in sorted(idle, key=lambda name: name in keep):
            if self._used + nbytes <= self._capacity:
                break
            del self._residents[name]
        return self._used + nbytes <= self._capacity

    def _give_back(self, names: list[str]) -> None:
        with self._changed:
            for name in names:
                self._residents[name].pins -= 1
            self._changed.notify_all()
