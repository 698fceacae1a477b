"""Large things beside the model: who stays, who goes, who waits."""

from collections.abc import Callable
from functools import partial
from threading import Event, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.adapters.residents import Residents, Wanted
from schemas.errors import AssetError


class Loads:
    """Loaders that remember who was loaded, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, **sizes: int) -> dict[str, Wanted[str]]:
        return {name: Wanted(partial(int, size), self._loader(name)) for name, size in sizes.items()}

    def _loader(self, name: str) -> Callable[[], str]:
        def load() -> str:
            self.names.append(name)
            return name.upper()

        return load


def test_what_is_resident_is_not_loaded_again() -> None:
    residents, loads = Residents[str](10), Loads()
    for _ in range(2):
        with residents.holding(loads(a=3, b=4)) as held:
            assert held == {"a": "A", "b": "B"}
    assert loads.names == ["a", "b"]


def test_the_least_recently_used_idle_value_makes_room() -> None:
    residents, loads = Residents[str](10), Loads()
    for name in "aba":
        with residents.holding(loads(**{name: 5})):
            pass
    with residents.holding(loads(c=5)):
        pass
    with residents.holding(loads(a=5)):
        pass
    assert loads.names == ["a", "b", "c"]


def test_what_is_held_stays_and_who_needs_its_room_waits() -> None:
    residents, loads = Residents[str](10), Loads()
    first = residents.holding(loads(a=6))
    first.__enter__()
    got: list[str] = []

    def take() -> None:
        with residents.holding(loads(b=6)) as held:
            got.extend(held.values())

    waiting = Thread(target=take)
    waiting.start()
    waiting.join(0.05)
    assert not got
    first.__exit__(None, None, None)
    waiting.join(10)
    assert got == ["B"]
    assert residents.pins == 0


def test_what_is_resident_does_not_wait_for_another_load() -> None:
    residents, loads, may_load, loading = Residents[str](10), Loads(), Event(), Event()

    def load_slowly() -> str:
        loading.set()
        assert may_load.wait(10)
        return "B"

    def take_b() -> None:
        with residents.holding({"b": Wanted(lambda: 5, load_slowly)}):
            pass

    with residents.holding(loads(a=5)):
        pass
    slow = Thread(target=take_b)
    slow.start()
    assert loading.wait(10)
    with residents.holding(loads(a=5)) as held:
        assert held == {"a": "A"}
    may_load.set()
    slow.join(10)
    assert loads.names == ["a"]


def test_two_that_need_each_others_room_do_not_wait_for_ever() -> None:
    residents = Residents[str](10)

    def take(**sizes: int) -> None:
        for _ in range(200):
            with residents.holding(Loads()(**sizes)):
                residents.check_integrity()

    threads = [Thread(target=take, kwargs=sizes) for sizes in ({"a": 5, "b": 5}, {"b": 5, "c": 5}, {"d": 9})]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert residents.pins == 0


def test_more_than_there_is_room_for_is_refused() -> None:
    residents = Residents[str](10)
    with pytest.raises(AssetError, match="11 bytes together; this server holds 10"):
        residents.holding(Loads()(a=5, b=6)).__enter__()
    residents.check_integrity()


def test_a_failed_load_leaves_nothing_held() -> None:
    residents = Residents[str](10)

    def fail() -> str:
        raise AssetError("broken", "invalid_weights")

    with pytest.raises(AssetError, match="broken"):
        residents.holding(Loads()(a=3) | {"b": Wanted(lambda: 3, fail)}).__enter__()
    assert residents.pins == 0
    with residents.holding(Loads()(c=10)) as held:
        assert held == {"c": "C"}


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.just(3), max_size=3), max_size=20))
def test_the_books_are_right_whatever_is_asked(wishes: list[dict[str, int]]) -> None:
    residents = Residents[str](10)
    for wish in wishes:
        with residents.holding(Loads()(**wish)) as held:
            assert held == {name: name.upper() for name in wish}
            residents.check_integrity()
            assert residents.pins == len(wish)
    assert residents.pins == 0
