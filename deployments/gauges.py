"""How long the queue is, told to the metrics every few seconds by whoever leads."""

from collections.abc import Collection

from deployments import metrics
from deployments.queue import Queue
from schemas.jobs import Priority, State

PERIOD_S = 5.0  # counting a long queue costs a read of its index

_OF_STATE = {State.QUEUED: metrics.WAITING, State.RUNNING: metrics.RUNNING}


class Gauges:
    """Remembers when it last looked."""

    def __init__(self) -> None:
        self._next = 0.0

    async def measure(self, queue: Queue, models: Collection[str]) -> None:
        """Tell what waits and runs of every model, unless that was done just now."""
        now = queue.now()
        if now < self._next <= now + PERIOD_S:  # the clock may be set
            return
        self._next = now + PERIOD_S
        loads = {(load.state, load.model, load.priority): load for load in await queue.loads()}
        for state, gauge in _OF_STATE.items():
            for model in models:
                for priority in Priority:
                    load = loads.get((state, model, priority))
                    gauge.set(load.count if load else 0, model=model, priority=priority.name.lower())
        for model in models:
            waiting = [loads[key].since for key in loads if key[:2] == (State.QUEUED, model)]
            metrics.OLDEST.set(max(0.0, now - min(waiting, default=now)), model=model)
