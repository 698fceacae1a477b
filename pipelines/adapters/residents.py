"""Large things beside the model, such as ControlNets: loaded once, kept while there is room."""

import gc
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
    """Something to be resident: how large it will be, in bytes, and how it is loaded.

    Both are called only if it is not resident yet.
    """

    measure: Callable[[], int]
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
        """The values, loaded where need be in their order, resident for as long as the block lasts.

        Waits while others hold the room, or load; not if all of them are resident already. Raises
        AssetError when they would not fit into an empty place, and whatever a loader raises.
        """
        held: list[str] = []
        try:
            if not self._find(wanted, held):
                with self._taking:
                    self._take_all(wanted, held)
            yield {name: self._residents[name].value for name in wanted}
        finally:
            self._give_back(held)

    def check_integrity(self) -> None:
        """Raise AssertionError when the books are wrong."""
        assert self._used <= self._capacity
        assert all(resident.pins >= 0 for resident in self._residents.values())

    @property
    def names(self) -> list[str]:
        """What is resident."""
        with self._changed:
            return list(self._residents)

    @property
    def pins(self) -> int:
        """How many holds are out."""
        return sum(resident.pins for resident in self._residents.values())

    @property
    def _used(self) -> int:
        return sum(resident.nbytes for resident in self._residents.values())

    def _find(self, wanted: Mapping[str, Wanted[V]], held: list[str]) -> bool:
        """Pin all of them at once, if they are here."""
        with self._changed:
            if wanted.keys() <= self._residents.keys():
                for name in wanted:
                    self._pin(name, held)
                return True
        return False

    def _take_all(self, wanted: Mapping[str, Wanted[V]], held: list[str]) -> None:
        """Pin them one by one, loading what is not here. One caller at a time."""
        with self._changed:
            known = {name: self._residents[name].nbytes for name in wanted if name in self._residents}
        sizes = {name: known[name] if name in known else each.measure() for name, each in wanted.items()}
        if (needed := sum(sizes.values())) > self._capacity:
            message = f"The files have {needed} bytes together; this server holds {self._capacity} at once."
            raise AssetError(message, "file_too_large", {"max_size": self._capacity})
        for name, each in wanted.items():
            if name not in self._residents:  # only a taker adds or evicts, and there is one at a time
                self._wait_for_room(sizes[name], keep=wanted)
                self._residents[name] = _Resident(each.load(), sizes[name])
            with self._changed:
                self._pin(name, held)

    def _wait_for_room(self, nbytes: int, keep: Mapping[str, Wanted[V]]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._make_room(nbytes, keep))
        gc.collect()  # modules with hooks are cycles: what was evicted must leave the device before the load

    def _pin(self, name: str, held: list[str]) -> None:
        self._residents[name].pins += 1
        self._residents.move_to_end(name)
        held.append(name)

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
