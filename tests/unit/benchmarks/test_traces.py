"""Traces over the policies: what the autoscaling promises."""

from functools import cache

import pytest

from benchmarks import scaling, traces
from benchmarks.simulation import Outcome, Request
from schemas.settings import AutoscalingSettings

LOADS = scaling.loads()


@cache
def ours(name: str) -> Outcome:
    rules, trace = LOADS[name]
    return scaling.outcome(scaling.scalers(rules)["ours"](), rules, trace)


def p95(done: Outcome) -> float:
    return sorted(done.waits)[int(len(done.waits) * 0.95)]


@pytest.mark.parametrize("name", LOADS)
def test_the_bounds_hold_and_nothing_is_lost(name: str) -> None:
    rules, trace = LOADS[name]
    done = ours(name)
    assert all(rules.least <= count <= rules.most for _, count in done.counts)
    assert sum(each.done_s for each in done.replicas) == pytest.approx(sum(each.work_s for each in trace))


@pytest.mark.parametrize("name", LOADS)
def test_nobody_waits_longer_than_under_serves_own_policy(name: str) -> None:
    """And for hardly more."""
    rules, trace = LOADS[name]
    stock = scaling.outcome(scaling.scalers(rules)["Serve's, 8 a replica"](), rules, trace)
    assert p95(ours(name)) <= 1.01 * p95(stock)
    assert ours(name).replica_s <= 1.2 * stock.replica_s


@pytest.mark.parametrize(("per_s", "settled"), [(0.2, 1), (0.8, 4), (1.4, 6)])
def test_a_steady_load_is_not_flapped_after(per_s: float, settled: int) -> None:
    trace = traces.steady(per_s, seconds=3 * traces.HOUR_S)
    done = scaling.outcome(scaling.scalers(scaling.RULES)["ours"](), scaling.RULES, trace)
    later = [count for at, count in done.counts if at > 1800]
    assert len(later) <= 3 * 8, "in two hours and a half, of a load that is drawn"
    assert abs(max(later, default=settled) - min(later, default=settled)) <= 3


def test_a_load_like_clockwork_moves_nothing_once_it_is_met() -> None:
    trace = [Request(at * 1.25, traces.WORK_S) for at in range(4000)]
    done = scaling.outcome(scaling.scalers(scaling.RULES)["ours"](), scaling.RULES, trace)
    assert [count for at, count in done.counts if at > 900] == []


def test_a_crowd_has_all_its_replicas_within_a_start() -> None:
    """It is noticed at the next tick, so that no more than a start lies between it and its replicas."""
    crowd = [Request(100.5, traces.WORK_S) for _ in range(300)]
    done = scaling.outcome(scaling.scalers(scaling.RULES)["ours"](), scaling.RULES, crowd)
    assert done.counts[1] == (101, scaling.RULES.most)


def test_the_usual_settings_are_those_simulated() -> None:
    usual = AutoscalingSettings()
    assert (usual.target_wait_s, usual.low_target_wait_s, usual.hold_s, usual.idle_s) == (
        scaling.RULES.target_wait_s,
        scaling.RULES.low_target_wait_s,
        scaling.RULES.hold_s,
        scaling.RULES.idle_s,
    )
    assert usual.policy == "work"
