"""Requests that name adapters over four replicas: what the router is for."""

from collections.abc import Sequence

import pytest

from benchmarks import routing, traces
from benchmarks.policies import Affinity
from benchmarks.simulation import Outcome, Request
from schemas.settings import ModelSettings

TRACE = traces.zipf(0.88)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {
        name: routing.outcome(make(), physics, TRACE)
        for name, (make, physics) in routing.routers(traces.WORK_S).items()
    }


def p95(done: Outcome) -> float:
    return sorted(done.waits)[int(len(done.waits) * 0.95)]


def fetches(done: Outcome) -> int:
    return sum(each.fetches for each in done.replicas)


def test_ours_fetches_less_and_waits_less(outcomes: dict[str, Outcome]) -> None:
    ours, *others = outcomes.values()
    for other in others:
        assert fetches(ours) < 0.7 * fetches(other)
        assert p95(ours) < 0.9 * p95(other)


def test_no_replica_is_hot(outcomes: dict[str, Outcome]) -> None:
    assert routing.balance(outcomes["ours"]) < 1.1


def test_hot_adapters_lie_on_several_replicas_and_cold_ones_on_one(outcomes: dict[str, Outcome]) -> None:
    ours = outcomes["ours"]
    assert routing.copies(ours) > 1
    asked = {each.adapter for each in TRACE}
    seldom = [name for name in asked if name and sum(each.adapter == name for each in TRACE) in (2, 3)]
    assert len(seldom) > 20
    assert sum(routing.copies(ours, name) == 1 for name in seldom) > len(seldom) / 3


def one_adapter(per_s: float) -> Outcome:
    trace: Sequence[Request] = [
        Request(each.at, each.work_s, "style") for each in traces.steady(per_s, seconds=600)
    ]
    return routing.outcome(Affinity(traces.WORK_S), routing.PHYSICS, trace)


def test_an_adapter_has_as_many_homes_as_its_load_needs() -> None:
    assert routing.copies(one_adapter(0.02), "style") == 1
    assert routing.copies(one_adapter(0.9), "style") == 4


def test_new_adapters_that_come_at_once_are_fetched_side_by_side() -> None:
    trace = [Request(0, 1, f"new {number}") for number in range(16)]
    done = routing.outcome(Affinity(1.0), routing.PHYSICS, trace)
    here = [each.fetches for each in done.replicas]
    assert max(here) <= 6, "they are spread"
    assert max(done.waits) <= routing.PHYSICS.fetch_s + max(here) * 1.0, (
        "one fetch, and a share of the compute"
    )


def test_the_places_are_those_of_the_settings() -> None:
    assert routing.PHYSICS.slots == ModelSettings.model_fields["concurrency"].default
