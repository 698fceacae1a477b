"""What Serve's controller asks of us, and what it is told."""

import warnings
from typing import Any

from deployments.autoscaling import WorkPolicy
from deployments.meter import Meter
from schemas.jobs import Backlog
from schemas.settings import ModelSettings
from tests.support.jobs import Clock

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Ray's use of pydantic
    from ray.serve._private.common import DeploymentID, TimeStampedValue
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    from deployments.app import _autoscaling

BUSY = {"busy": 1.0, "busy_s": 250.0, "done": 50.0, "start_s": 60.0, "waiting": 0, "low": 0, "told_at": 1.0}


def settings(**autoscaling: Any) -> ModelSettings:
    args = {"model": "x", "endpoints": ["a"], "min_replicas": 0, "max_replicas": 8}
    return ModelSettings.model_validate(args | {"autoscaling": autoscaling})


def config(**autoscaling: Any) -> AutoscalingConfig:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of metrics_interval_s
        return _autoscaling(settings(**autoscaling))


def policy(**kwargs: Any) -> WorkPolicy:
    """As Serve makes it of the settings."""
    wishes = config(**kwargs).policy
    made: WorkPolicy = wishes.get_policy()(**wishes.policy_kwargs)
    return made


def context(
    at: float = 0.0, *, handed: float = 0.0, target: int = 1, told: tuple[dict[str, float], ...] = ()
) -> AutoscalingContext:
    """One of Serve's own, of a replica for each of `told`."""
    names = told[0] if told else ()
    metrics = {
        name: {f"r{n}": [TimeStampedValue(at, each[name])] for n, each in enumerate(told)} for name in names
    }
    return AutoscalingContext(
        deployment_id=DeploymentID(name="worker", app_name="flux"),
        deployment_name="worker",
        app_name="flux",
        current_num_replicas=len(told),
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=handed,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=lambda: metrics,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=at,
        config=None,
    )


def test_serve_takes_either_policy_and_ours_is_the_usual_one() -> None:
    assert config().policy.policy_function == "deployments.autoscaling:WorkPolicy"
    assert (config().upscale_delay_s, config().downscale_delay_s) == (0, 0), "ours holds by itself"
    stock = config(policy="requests", hold_s=5, idle_s=7)
    assert stock.policy.is_default_policy_function()
    assert (stock.downscale_delay_s, stock.downscale_to_zero_delay_s) == (5, 7)


def test_a_full_replica_gets_help() -> None:
    assert policy()(context(handed=12, told=(BUSY,)))[0] == 4  # a minute's work, a target of 10 s + 5 s


def test_what_waits_where_serve_does_not_see_it_counts() -> None:
    more = BUSY | {"waiting": 60, "told_at": 2.0}
    assert policy()(context(handed=12, told=(BUSY, more)))[0] == 8
    older = BUSY | {"waiting": 60, "told_at": 0.5}
    assert policy()(context(handed=12, told=(BUSY, older)))[0] == 4, "the latest word is the one"


def test_a_word_of_what_waits_does_not_outlive_the_requests() -> None:
    asleep = policy(idle_s=5, hold_s=50)
    told = BUSY | {"busy": 0.0, "waiting": 60}
    asleep(context(0, handed=1, told=(told,)))
    assert asleep(context(4, handed=0, target=2, told=(told,)))[0] == 2, "the hold"
    assert asleep(context(200, handed=0, target=2, told=(told,)))[0] == 1
    assert asleep(context(201, handed=0, told=(told,)))[0] == 0


def test_what_was_measured_is_remembered_without_a_replica() -> None:
    slow = policy()
    slow(context(0, handed=1, told=(BUSY | {"busy_s": 5000.0},)))  # 100 s each
    crowd = context(1, handed=6)
    assert slow(crowd)[0] == 6
    assert policy()(crowd)[0] == 2, "five seconds are taken for the usual"


def test_a_replica_that_has_told_nothing_yet_is_no_harm() -> None:
    assert policy()(context(handed=1, told=({},)))[0] == 1


def test_the_time_of_a_start_is_measured_unless_it_is_given() -> None:
    idle = BUSY | {"busy": 0.0}
    few = context(handed=8, told=(idle,))
    assert policy()(few)[0] == 1, "done before another would be there"
    assert policy(start_s=0)(few)[0] == 3


def test_a_meter_counts_the_time_that_requests_share() -> None:
    clock = Clock()
    meter = Meter(2.0, clock)
    with meter.request(), meter.request():
        clock.now += 10
    told = meter.told()
    assert told["start_s"] == 2.0
    assert 4.9 < told["busy_s"] / told["done"] <= 5.0
    clock.now += 1000
    assert meter.told()["busy"] < 0.01
    assert meter.told()["done"] < 0.1


def test_a_meter_says_how_busy_it_is_of_late() -> None:
    clock = Clock()
    meter = Meter(0.0, clock)
    for _ in range(300):
        with meter.request():
            clock.now += 1
            meter.told()  # looks change nothing
        clock.now += 3
    assert 0.2 < meter.told()["busy"] < 0.3


def test_a_meter_keeps_the_last_word_of_what_waits_and_when_it_came() -> None:
    clock = Clock()
    meter = Meter(0.0, clock)
    meter.hear(Backlog(5, 1))
    clock.now += 1
    meter.hear(Backlog(3, 2))
    assert [meter.told()[name] for name in ("waiting", "low", "told_at")] == [3, 2, clock.now]
