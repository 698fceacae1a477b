"""How many replicas there should be."""

from collections.abc import Iterable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from deployments.scaling import Load, Past, Rules, decide, need

RULES = Rules(least=1, most=8, target_wait_s=10, low_target_wait_s=100, hold_s=120, idle_s=300)
LOAD = Load(at=0, requests=1, low=0, seconds=5, busy=0.5, ready=1, replicas=1, start_s=60)

bounds = st.tuples(st.integers(0, 6), st.integers(1, 20)).map(lambda two: (min(two), max(two)))
rules = st.builds(
    lambda two, *waits: Rules(*two, *waits),
    bounds,
    st.floats(0.1, 100),
    st.floats(0.1, 1000),
    st.floats(0, 500),
    st.floats(0, 500),
)
loads = st.builds(
    Load,
    at=st.floats(0, 1e6),
    requests=st.floats(0, 1e4),
    low=st.just(0),
    seconds=st.floats(0.01, 300),
    busy=st.floats(0, 20),
    ready=st.integers(0, 20),
    replicas=st.integers(0, 20),
    start_s=st.floats(0, 600),
)


def play(loads: Iterable[Load], rules: Rules = RULES) -> list[int]:
    """The decisions on loads a second apart, each told of the one before."""
    past, replicas, decided = Past(), 1, []
    for at, load in enumerate(loads):
        now = replace(load, at=float(at), replicas=replicas, ready=min(load.ready, replicas))
        replicas, past = decide(now, rules, past)
        decided.append(replicas)
    return decided


@given(st.lists(loads, min_size=1, max_size=30), rules)
def test_the_bounds_always_hold(news: list[Load], rules: Rules) -> None:
    assert all(rules.least <= count <= rules.most for count in play(news, rules))


@given(loads, rules, st.floats(1, 10), st.sampled_from(["requests", "seconds", "busy"]))
def test_more_to_do_never_needs_fewer(load: Load, rules: Rules, times: float, what: str) -> None:
    more = replace(load, **{what: getattr(load, what) * times})
    assert need(more, rules) >= need(load, rules)


@given(st.lists(loads, min_size=1, max_size=30), rules, st.integers(1, 1000))
def test_more_to_do_never_has_fewer_decided(news: list[Load], rules: Rules, extra: int) -> None:
    """With what was before it, also."""
    more = [replace(load, requests=load.requests + extra) for load in news]
    assert all(many >= few for many, few in zip(play(more, rules), play(news, rules), strict=True))


@given(loads, rules)
def test_there_is_a_replica_for_whoever_waits(load: Load, rules: Rules) -> None:
    count, _ = decide(replace(load, requests=1), rules, Past())
    assert count >= 1


def test_a_queue_of_quick_requests_needs_fewer_than_one_of_slow_ones() -> None:
    quick, slow = (need(replace(LOAD, requests=50, seconds=each, ready=0), RULES) for each in (0.1, 60.0))
    assert (quick, slow) == (1, 8)


@given(loads, rules, st.floats(0, 1), st.floats(0, 1))
def test_low_priority_never_needs_more_than_normal_does(
    load: Load, rules: Rules, one: float, other: float
) -> None:
    few, many = sorted((one, other))
    fewer_low, more_low = (replace(load, low=load.requests * share) for share in (few, many))
    assert need(more_low, rules) <= need(fewer_low, rules)


def test_each_priority_has_a_target_of_its_own() -> None:
    waiting = replace(LOAD, requests=60, seconds=5, ready=0)
    assert need(replace(waiting, low=60), RULES) == 3, "300 s within 100 s and one of its own"
    assert need(replace(waiting, low=55), RULES) == 3
    assert need(replace(waiting, low=45), RULES) == 5, "75 s within 10 s and one of its own"
    assert need(waiting, RULES) == 8


def test_nobody_is_started_for_what_is_done_before_they_could_help() -> None:
    waiting = replace(LOAD, requests=8, seconds=5, busy=0.2)
    assert need(replace(waiting, start_s=60), RULES) == 1
    assert need(replace(waiting, start_s=0), RULES) == 3
    assert need(replace(waiting, start_s=60, busy=1.0), RULES) == 3, "there is no time to spare"


def test_a_crowd_has_its_replicas_asked_for_at_once() -> None:
    quiet = [replace(LOAD, requests=0, busy=0.0)] * 100
    crowd = replace(LOAD, requests=200, busy=0.0)
    assert play([*quiet, crowd])[-2:] == [1, 8]


def test_fewer_come_only_after_the_hold_and_after_a_start() -> None:
    def kept(rules: Rules, start_s: float) -> int:
        """Seconds for which the replicas of a crowd outlive it."""
        crowd = replace(LOAD, requests=200, busy=0.0, start_s=start_s)
        counts = play([crowd, *[replace(crowd, requests=1)] * 400], rules)
        return counts[1:].index(1)

    assert kept(RULES, start_s=60) == 119
    assert kept(replace(RULES, hold_s=10), start_s=60) == 59


def test_replicas_at_work_stay() -> None:
    held = play([replace(LOAD, requests=200, ready=8), *[replace(LOAD, requests=6, busy=4.1, ready=8)] * 400])
    assert held[-1] == 6


def test_a_load_that_swings_within_the_hold_moves_nothing() -> None:
    few, many = replace(LOAD, requests=1, busy=1.0), replace(LOAD, requests=10, busy=1.0)
    counts = play(many if at // 30 % 2 else few for at in range(2000))
    assert len(set(counts[31:])) == 1


def idle(after: int, rules: Rules) -> list[int]:
    return play([LOAD, *[replace(LOAD, requests=0, busy=0)] * after], rules)


def test_the_last_one_goes_after_the_idle_time_where_none_is_allowed() -> None:
    to_zero = replace(RULES, least=0)
    counts = idle(400, to_zero)
    assert counts.index(0) == RULES.idle_s
    assert set(counts[counts.index(0) :]) == {0}
    assert set(idle(400, RULES)) == {1}


def test_what_was_done_a_while_ago_keeps_nobody_awake() -> None:
    to_zero = replace(RULES, least=0)
    counts = play([LOAD, *[replace(LOAD, requests=0, busy=1.0)] * 400], to_zero)
    assert counts.index(0) == RULES.idle_s


def test_an_autoscaler_that_starts_anew_stops_nobody_at_once() -> None:
    """It knows nothing of what was before."""
    quiet = replace(LOAD, requests=0, busy=0, replicas=5, ready=5)
    count, _ = decide(quiet, replace(RULES, least=0), Past())
    assert count == 5


def test_what_is_remembered_stays_small() -> None:
    past, sizes = Past(), []
    for at in range(1000):
        wave = float(at * 7919 % 200)
        _, past = decide(replace(LOAD, at=float(at), requests=wave, replicas=8), RULES, past)
        sizes.append(len(past.needed))
    assert max(sizes) <= RULES.most + 1
