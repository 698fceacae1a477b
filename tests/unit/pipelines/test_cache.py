"""The cache in RAM: bounded, and one load for all who ask at once."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import numpy as np
import pytest

from pipelines.adapters.cache import Cache

Value = np.ndarray


def value(nbytes: int) -> Value:
    return np.zeros(nbytes, dtype=np.uint8)


def test_what_was_used_last_stays() -> None:
    cache: Cache[str, Value] = Cache(30)
    for name in "abc":
        cache.get(name, lambda: value(10))
    cache.find("a")
    cache.get("d", lambda: value(10))
    assert cache.names == ["c", "a", "d"]
    assert cache.nbytes == 30


def test_a_value_put_again_counts_once() -> None:
    cache: Cache[str, Value] = Cache(30)
    for size in (10, 20, 5):
        cache.keep("a", value(size))
    assert cache.nbytes == 5


@pytest.mark.parametrize("capacity", [0, 9])
def test_what_is_too_large_is_given_and_not_kept(capacity: int) -> None:
    cache: Cache[str, Value] = Cache(capacity)
    assert len(cache.get("a", lambda: value(10))) == 10
    assert (cache.names, cache.nbytes) == ([], 0)


@pytest.mark.parametrize("capacity", [0, 1000])
def test_eight_who_ask_at_once_wait_for_one_load(capacity: int) -> None:
    cache: Cache[str, Value] = Cache(capacity)
    begun, go, loads = Event(), Event(), list[int]()

    def load() -> Value:
        loads.append(1)
        begun.set()
        assert go.wait(10)
        return value(10)

    with ThreadPoolExecutor(9) as callers:
        first = callers.submit(cache.get, "a", load)
        assert begun.wait(10)
        others = [callers.submit(cache.get, "a", load) for _ in range(7)]
        callers.submit(cache.get, "b", lambda: value(1)).result(10)  # other names wait for nobody
        go.set()
        found = [each.result(10) for each in (first, *others)]
    if capacity:  # what is not kept may be loaded again by one who came late
        assert len(loads) == 1
        assert all(each is found[0] for each in found)


def test_a_load_that_fails_is_the_failure_of_its_caller_only() -> None:
    cache: Cache[str, Value] = Cache(1000)
    begun, go = Event(), Event()

    def fail() -> Value:
        begun.set()
        assert go.wait(10)
        raise ValueError("broken")

    with ThreadPoolExecutor(2) as callers:
        failing = callers.submit(cache.get, "a", fail)
        assert begun.wait(10)
        waiting = callers.submit(cache.get, "a", lambda: value(3))
        go.set()
        with pytest.raises(ValueError, match="broken"):
            failing.result(10)
        assert len(waiting.result(10)) == 3
    assert cache.names == ["a"]


def test_the_books_are_right_after_many_threads() -> None:
    cache: Cache[int, Value] = Cache(100)
    together = Barrier(8)

    def use(seed: int) -> None:
        together.wait()
        for name in np.random.default_rng(seed).integers(0, 30, 500):
            assert len(cache.get(int(name), lambda: value(int(name)))) == name  # noqa: B023 - called at once

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(use, range(8)))
    assert cache.nbytes == sum(cache.names) <= 100
