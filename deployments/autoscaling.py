"""Serve's autoscaling policy of a model: by the work that waits, see `scaling`.

It lives in Serve's controller and is called ten times a second, so it neither waits nor asks: Serve
counts the requests that it was handed, the replicas tell the rest, see `meter`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from deployments.meter import USUAL_S, Told
from deployments.scaling import Load, Past, Rules, decide

USUAL_START_S = 30.0  # before a replica has started


class WorkPolicy:
    """Named in Serve's AutoscalingConfig, which makes one for each model.

    `start_s`: None takes what replicas have taken.
    """

    def __init__(
        self,
        target_wait_s: float,
        low_target_wait_s: float,
        hold_s: float,
        idle_s: float,
        start_s: float | None = None,
    ) -> None:
        self._wishes = {
            "target_wait_s": target_wait_s,
            "low_target_wait_s": low_target_wait_s,
            "hold_s": hold_s,
            "idle_s": idle_s,
        }
        self._given_start_s = start_s
        self._start_s = USUAL_START_S
        self._seconds = USUAL_S
        self._past = Past()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas, for a ray.serve.config.AutoscalingContext, and no state of Serve's."""
        told = list(_told(context.raw_metrics or {}))
        self._learn(told)
        handed = float(context.total_num_requests)
        waiting, low = _backlog(told)
        requests = handed + waiting if handed else 0.0  # what waits would have been handed
        load = Load(
            at=context.current_time,
            requests=requests,
            low=min(low, requests),  # told a while ago
            seconds=self._seconds,
            busy=sum(each.get("busy", 0.0) for each in told),
            ready=context.current_num_replicas,
            replicas=context.target_num_replicas,
            start_s=self._start_s if self._given_start_s is None else self._given_start_s,
        )
        rules = Rules(
            context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas, **self._wishes
        )
        replicas, self._past = decide(load, rules, self._past)
        return replicas, {}

    def _learn(self, told: list[Told]) -> None:
        """Keep what replicas have measured, for when there is none."""
        self._start_s = max((each["start_s"] for each in told if "start_s" in each), default=self._start_s)
        done = sum(each.get("done", 0.0) for each in told)
        if done >= 1:
            self._seconds = sum(each.get("busy_s", 0.0) for each in told) / done


def _told(metrics: Mapping[str, Mapping[Any, Any]]) -> Iterable[Told]:
    """What each replica said last, of its values by name and time."""
    replicas: dict[Any, Told] = {}
    for name, of in metrics.items():
        for replica, series in of.items():
            if series:
                replicas.setdefault(replica, {})[name] = series[-1].value
    return replicas.values()


def _backlog(told: Iterable[Told]) -> tuple[float, float]:
    """The latest that any was told of what waits where Serve does not see it, and of low priority's."""
    latest = max(told, key=lambda each: each.get("told_at", 0.0), default={})
    return latest.get("waiting", 0.0), latest.get("low", 0.0)
