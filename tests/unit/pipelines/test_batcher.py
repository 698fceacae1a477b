"""Who goes first: what the batcher promises, over mixes of pictures that nobody thought of."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.batching import H200, Ours, Played, Steps, Together, Wish, mixed, play
from pipelines.engine.batcher import PATIENCE, Batcher
from pipelines.engine.pace import Curve, Pace
from pipelines.engine.sample import Sample
from schemas.jobs import Priority
from tests.support.engine import NOTHING

BUDGET = 16
COSTS = (1, 4, 20)  # the last one alone is more than the budget

PACES = st.sampled_from(
    [Pace(), Pace(rows=2), Pace((Curve(1, {1: 1.0, 2: 1.2, 4: 1.6}), Curve(4, {1: 3.0, 2: 6.0})))]
)
WISHES = st.lists(
    st.builds(
        Wish,
        at=st.floats(0, 60),
        steps=st.integers(1, 12),
        cost=st.sampled_from(COSTS),
        priority=st.sampled_from(Priority),
    ),
    min_size=1,
    max_size=25,
    unique=True,
)


def sample(steps: int, cost: int = 1) -> Sample:
    return Sample("", Steps(steps, cost), NOTHING)


def admitted(batcher: Batcher, steps: int, cost: int = 1, priority: Priority = Priority.NORMAL) -> Sample:
    new = sample(steps, cost)
    batcher.admit(new, priority)
    return new


def step(batch: Sequence[Sample]) -> None:
    for each in batch:
        each.step += 1


@given(WISHES, PACES)
def test_every_picture_gets_all_its_steps_and_no_turn_is_empty(wishes: list[Wish], pace: Pace) -> None:
    played = play(wishes, Ours(pace), BUDGET)
    assert played.ends.keys() == set(wishes)
    for wish in wishes:
        assert sum(wish in rows for _, rows in played.turns) == wish.steps
    assert all(rows for _, rows in played.turns)


@given(WISHES, PACES)
def test_work_never_waits_while_the_device_is_idle(wishes: list[Wish], pace: Pace) -> None:
    played = play(wishes, Ours(pace), BUDGET)
    idle_until = 0.0
    for at, rows in played.turns:
        if at > idle_until:  # nothing ran before this turn: only what had just come can be in it
            assert at == min(wish.at for wish in wishes if played.ends[wish] > idle_until)
        idle_until = at + pace.work(rows[0].cost, sum(wish.cost for wish in rows))


@given(WISHES, PACES)
def test_a_forward_keeps_to_the_budget_and_to_what_gains_and_has_one_shape(
    wishes: list[Wish], pace: Pace
) -> None:
    for _, rows in play(wishes, Ours(pace), BUDGET).turns:
        cost = rows[0].cost
        assert {wish.cost for wish in rows} == {cost}
        assert len(rows) == 1 or len(rows) * cost <= min(BUDGET, pace.worth(cost))


@given(WISHES, PACES)
def test_whoever_fits_into_the_forward_of_the_first_is_in_it(wishes: list[Wish], pace: Pace) -> None:
    batcher, active = Batcher(pace), list[Sample]()
    for wish in wishes:
        active.append(admitted(batcher, wish.steps, wish.cost, wish.priority))
    while active:
        batch = batcher.choose(active, BUDGET)
        cost = batch[0].cost
        left_out = [each for each in active if each not in batch and each.cost == cost]
        assert not left_out or (len(batch) + 1) * cost > min(BUDGET, pace.worth(cost))
        assert batch == [each for each in active if each in batch], "rows stay in the order of their coming"
        step(batch)
        active = [each for each in active if not each.is_done]


@settings(max_examples=50)
@given(WISHES, PACES, st.integers(1, 6), st.sampled_from(COSTS), st.sampled_from(Priority))
def test_nothing_starves_under_an_endless_stream(
    wishes: list[Wish], pace: Pace, steps: int, cost: int, priority: Priority
) -> None:
    """Once the clock has reached a sample's due time, those who are there may go first, and nobody else."""
    batcher = Batcher(pace)
    ours = admitted(batcher, steps, cost, priority)
    due = batcher.due(ours)
    assert due == PATIENCE[priority] * steps * pace.work(cost, cost)
    active, turns_left = [ours], None
    for turn in range(10_000):
        wish = wishes[turn % len(wishes)]  # the stream: one comes with every turn
        active.append(admitted(batcher, wish.steps, wish.cost))
        if turns_left is None and batcher.clock >= due:
            turns_left = sum(each.plan.steps - each.step for each in active)
        batch = batcher.choose(active, BUDGET)
        step(batch)
        active = [each for each in active if not each.is_done]
        if ours.is_done:
            return
        if turns_left is not None:
            turns_left -= 1
            assert turns_left > 0
    raise AssertionError("it starved")


def test_a_long_low_picture_stands_back_for_a_short_one_between_two_steps_and_goes_on_after() -> None:
    low, high = Wish(0, 50, 4096, Priority.LOW), Wish(1, 4, 4096)
    rows = [wishes for _, wishes in play([low, high], Ours(H200)).turns]
    begun = rows.index((high,))
    assert rows == [(low,)] * begun + [(high,)] * 4 + [(low,)] * (50 - begun)
    assert begun == 9  # the step under way at 1 s is the ninth


def test_a_low_picture_that_is_nearly_done_ends_first() -> None:
    low, high = Wish(0, 50, 4096, Priority.LOW), Wish(5.6, 28, 4096)
    assert play([low, high], Ours(H200)).turns[49][1] == (low,)


def test_a_low_picture_joins_the_rows_of_its_shape_where_they_gain() -> None:
    low, high = Wish(0, 28, 1024, Priority.LOW), Wish(0, 28, 1024)
    assert all(set(rows) == {low, high} for _, rows in play([low, high], Ours(H200)).turns)


def test_of_equals_the_first_runs_to_its_end_where_rows_gain_nothing() -> None:
    first, second = Wish(0, 8), Wish(0.1, 8)
    assert [rows for _, rows in play([first, second], Ours(H200)).turns] == [(first,)] * 8 + [(second,)] * 8


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_short_pictures_of_normal_priority_wait_less_and_the_device_works_at_most_a_tenth_more() -> None:
    for seed in range(3):
        wishes = mixed(seed, 600, 0.8)
        ours, fifo = play(wishes, Ours(H200)), play(wishes, Together(H200))
        assert mean(ours.latencies(Priority.NORMAL)) < 0.7 * mean(fifo.latencies(Priority.NORMAL))
        assert mean(ours.latencies(Priority.LOW)) < 1.3 * mean(fifo.latencies(Priority.LOW))
        assert ours.busy_s < 1.1 * fifo.busy_s
        assert last(ours) < 1.1 * last(fifo)


def last(played: Played) -> float:
    return max(played.ends.values())
