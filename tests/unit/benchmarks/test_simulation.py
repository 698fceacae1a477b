"""The simulator against what can be worked out by hand."""

from dataclasses import replace

import pytest

from benchmarks.policies import Affinity, Fixed, PowerOfTwo
from benchmarks.simulation import Outcome, Physics, Request, View, run

PHYSICS = Physics(slots=2, start_s=10, fetch_s=2, load_s=0.5, room=1)
ONE = Fixed(1)


def play(*requests: Request, physics: Physics = PHYSICS, replicas: int = 1) -> Outcome:
    return run(requests, physics, PowerOfTwo(), Fixed(replicas), replicas=replicas)


def test_one_alone_waits_for_nothing() -> None:
    assert play(Request(1, 5)).waits == [0]


def test_two_side_by_side_share_a_replica_and_a_third_waits_for_a_place() -> None:
    assert play(Request(0, 4), Request(0, 4), Request(0, 4)).waits == [4, 4, 8]


def test_who_comes_later_takes_half_of_what_is_left() -> None:
    assert play(Request(0, 4), Request(2, 1)).waits == [1, 1]


def test_an_adapter_is_fetched_once_and_loaded_again_after_another_took_its_place() -> None:
    done = play(*(Request(at, 1, name) for at, name in ((0, "a"), (10, "a"), (20, "b"), (30, "a"))))
    assert done.waits == [2, 0, 2, 0.5]
    assert [(each.fetches, each.loads) for each in done.replicas] == [(2, 1)]


def test_fetches_overlap_unless_they_come_one_by_one() -> None:
    two = Request(0, 1, "a"), Request(0, 1, "b")
    assert play(*two).waits == [3, 3]  # they share the replica
    assert play(*two, physics=replace(PHYSICS, loads_one_by_one=True)).waits == [2, 4]


def test_requests_for_one_adapter_wait_for_one_fetch() -> None:
    done = play(Request(0, 1, "a"), Request(1, 1, "a"))
    assert done.replicas[0].fetches == 1
    assert done.waits == [3, 2]


def test_replicas_start_and_go_and_are_paid_for() -> None:
    def scaler(view: View) -> int:
        return 2 if view.at < 5 else 1

    done = run([Request(0, 40), Request(0, 1)], PHYSICS, Affinity(), scaler, replicas=1)
    assert done.counts == [(0, 1), (1, 2), (5, 1)]
    assert done.starts == 1
    assert done.replica_s == pytest.approx(41 + 4)


def test_a_replica_that_goes_ends_what_it_has() -> None:
    def scaler(view: View) -> int:
        return 0 if view.at < 3 else 1

    done = run([Request(0, 8), Request(4, 1)], PHYSICS, Affinity(), scaler, replicas=1)
    assert done.waits == [0, 9], "the first is not lost, the second waits for a start"


def test_nothing_is_lost_and_runs_are_alike() -> None:
    requests = [Request(at / 3, 1 + at % 5, f"a{at % 7}") for at in range(300)]
    first, second = (play(*requests, replicas=3) for _ in range(2))
    assert first.waits == second.waits
    assert sum(each.done_s for each in first.replicas) == sum(each.work_s for each in requests)
