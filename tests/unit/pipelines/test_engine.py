"""The loop, with a model that only counts."""

from collections.abc import Sequence
from threading import Event

import pytest
import torch
from torch import Tensor

from pipelines.engine.engine import Engine
from pipelines.engine.pace import Pace
from pipelines.engine.sample import Advanced, Plan, Sample
from schemas.errors import OutOfMemory
from schemas.jobs import Priority
from tests.support.engine import Ears, run_to_end, turn


class CountingPlan(Plan):
    """Adds the prediction, `steps` times."""

    def __init__(self, steps: int, key: str = "same", cost: int = 1) -> None:
        self.steps, self._key, self._cost = steps, key, cost

    def key(self, step: int) -> str:
        return self._key

    def cost(self, step: int) -> int:
        return self._cost

    def advance(self, step: int, latents: Tensor, prediction: Tensor, previous: Tensor | None) -> Advanced:
        return Advanced(latents + prediction, latents)


def sample(name: str, steps: int = 3, key: str = "same", cost: int = 1) -> Sample:
    return Sample(name, CountingPlan(steps, key, cost), torch.zeros(1))


class Model:
    """Predicts ones, and remembers who shared a forward."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, samples: Sequence[Sample]) -> list[Tensor]:
        self.batches.append([each.name for each in samples])
        return [torch.ones(1) for _ in samples]


def test_every_sample_gets_its_own_number_of_steps() -> None:
    samples = [sample("a", 2), sample("b", 5), sample("c", 1)]
    ears = run_to_end(Engine(Model(), budget=10), samples)
    assert [each.latents.item() for each in samples] == [2, 5, 1]
    assert ears.ends == {"a": None, "b": None, "c": None}
    assert ears.steps.count("b") == 5


def test_samples_of_one_key_share_a_forward_and_others_do_not() -> None:
    model = Model()
    run_to_end(Engine(model, budget=10), [sample("a", 1), sample("b", 1, "other"), sample("c", 1)])
    assert model.batches == [["a", "c"], ["b"]]


def test_a_batch_keeps_to_the_budget_but_one_sample_always_fits() -> None:
    model = Model()
    big, small = sample("big", 1, cost=100), [sample(str(i), 1, cost=4) for i in range(4)]
    run_to_end(Engine(model, budget=8), [big, *small])
    assert model.batches == [["0", "1"], ["2", "3"], ["big"]]


def test_a_low_priority_lets_others_pass_and_is_not_forgotten() -> None:
    model, ears = Model(), Ears()
    engine, low = Engine(model, budget=1), sample("low", 2)
    engine.add(low, ears, Priority.LOW)
    for number in range(40):
        engine.add(sample(str(number), 1), ears)
        turn(engine)
    order = [name for [name] in model.batches]
    assert order.index("low") == 15, "two steps of low priority let less than sixteen pass"
    assert ears.ends["low"] is None


def test_as_many_rows_share_a_forward_as_the_pace_says() -> None:
    model = Model()
    run_to_end(Engine(model, budget=100, pace=Pace(rows=2)), [sample(str(i), 2) for i in range(3)])
    assert model.batches == [["0", "1"], ["0", "1"], ["2"], ["2"]]


def test_a_removed_sample_takes_no_further_step_and_ends_silently() -> None:
    model, ears = Model(), Ears()
    engine, gone, stays = Engine(model, budget=10), sample("gone", 10), sample("stays", 3)
    engine.add(gone, ears)
    engine.add(stays, ears)
    turn(engine)
    engine.remove(gone)
    while len(engine):
        turn(engine)
    assert gone.step == 1
    assert ears.ends == {"stays": None}


def test_a_sample_removed_while_its_step_runs_is_not_advanced() -> None:
    ears = Ears()
    going = sample("going")

    def remove_midway(samples: Sequence[Sample]) -> list[Tensor]:
        engine.remove(going)
        return [torch.ones(1)]

    engine = Engine(remove_midway, budget=1)
    engine.add(going, ears)
    turn(engine)
    assert going.step == 0
    assert not ears.steps
    assert not ears.ends


def test_a_row_that_fails_fails_alone() -> None:
    def predict(samples: Sequence[Sample]) -> list[Tensor]:
        if any(each.name == "bad" and each.step == 1 for each in samples):
            raise RuntimeError("out of memory")
        return [torch.ones(1) for _ in samples]

    good, bad = sample("good"), sample("bad")
    ears = run_to_end(Engine(predict, budget=10), [good, bad])
    assert ears.ends["good"] is None
    assert isinstance(ears.ends["bad"], RuntimeError)
    assert good.latents.item() == 3


def test_a_plan_that_fails_fails_alone_and_no_row_is_stepped_twice() -> None:
    class BrokenPlan(CountingPlan):
        def advance(
            self, step: int, latents: Tensor, prediction: Tensor, previous: Tensor | None
        ) -> Advanced:
            if step == 1:
                raise ValueError("a step that cannot be")
            return super().advance(step, latents, prediction, previous)

    good, bad = sample("good"), Sample("bad", BrokenPlan(3), torch.zeros(1))
    ears = run_to_end(Engine(Model(), budget=10), [good, bad])
    assert isinstance(ears.ends["bad"], ValueError)
    assert ears.ends["good"] is None
    assert good.latents.item() == 3


def test_a_sample_knows_how_many_shared_its_steps() -> None:
    short, long = sample("short", 2), sample("long", 4)
    run_to_end(Engine(Model(), budget=10), [short, long])
    assert (short.company, long.company) == (2 + 2, 2 + 2 + 1 + 1)


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_t29_a_batch_too_large_for_memory_goes_through_in_smaller_ones() -> None:
    class Small(Model):
        def __call__(self, samples: Sequence[Sample]) -> list[Tensor]:
            found = super().__call__(samples)
            if len(samples) > 2:
                raise out_of_memory()
            return found

    model = Small()
    samples = [sample(str(i), 2) for i in range(8)]
    ears = run_to_end(Engine(model, budget=100), samples)
    assert ears.ends == {str(i): None for i in range(8)}
    assert [each.latents.item() for each in samples] == [2] * 8
    sizes = [len(batch) for batch in model.batches]
    assert sizes[:7] == [8, 4, 2, 2, 4, 2, 2]
    assert max(sizes[7:]) <= 3  # it has learnt: a turn costs no more than a try and its halves
    assert len(sizes) <= 7 + 2 * 8


def test_t29_after_a_time_batches_grow_again() -> None:
    crowded = iter([True])

    class Crowded(Model):
        def __call__(self, samples: Sequence[Sample]) -> list[Tensor]:
            found = super().__call__(samples)
            if next(crowded, False):
                raise out_of_memory()
            return found

    model = Crowded()
    run_to_end(Engine(model, budget=8), [sample(str(i), 40) for i in range(8)])
    sizes = [len(batch) for batch in model.batches]
    assert sizes[:4] == [8, 4, 4, 4]
    assert 8 in sizes[4:]


@pytest.mark.parametrize("form", [torch.OutOfMemoryError, MemoryError])
def test_t29_a_row_that_does_not_fit_alone_fails_alone_after_a_second_try(form: type[Exception]) -> None:
    class Strained(Model):
        def __call__(self, samples: Sequence[Sample]) -> list[Tensor]:
            found = super().__call__(samples)
            if any(each.name == "big" and each.step == 1 for each in samples):
                raise form("no room")
            return found

    model = Strained()
    ears = run_to_end(Engine(model, budget=8), [*(sample(str(i)) for i in range(7)), sample("big")])
    assert isinstance(ears.ends.pop("big"), OutOfMemory)
    assert ears.ends == {str(i): None for i in range(7)}
    assert model.batches.count(["big"]) == 2


class Bell(Ears):
    """Ears that another thread can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.rang = Event()

    def ended(self, sample: Sample, error: BaseException | None) -> None:
        super().ended(sample, error)
        self.rang.set()


def test_on_its_own_thread_it_sleeps_without_work_and_wakes_for_it() -> None:
    engine = Engine(Model(), budget=10)
    engine.start()
    for name in ("one", "two"):
        bell = Bell()
        engine.add(sample(name), bell)
        assert bell.rang.wait(10)
        assert bell.ends == {name: None}
    engine.close()
    assert not engine.is_alive


def test_a_closed_engine_takes_nothing() -> None:
    engine = Engine(Model(), budget=1)
    engine.start()
    engine.close()
    with pytest.raises(AssertionError, match="closed"):
        engine.add(sample("late"), Ears())
