"""Where a request's seconds went, and how fast its steps were: the answer's timings, and the metrics."""

import time
from collections.abc import Mapping, Sequence

from deployments import metrics, traces
from pipelines.base import Generation

NO_STAGES = frozenset(("queue", "inference", "steps_skipped", "float8_layers"))  # of timings


class Stopwatch:
    """Seconds by stage, and in all as `inference`. Each stage is a part of the request's span."""

    def __init__(self, span: traces.Span) -> None:
        self._span = span
        self._start = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, stage: str, moments: Sequence[traces.Moment] = ()) -> None:
        now = time.monotonic()
        self._span.child(stage, now - self._last, moments)
        self._laps[stage] = round(now - self._last, 4)
        self._last = now

    def seconds(self, stage: str) -> float:
        return self._laps[stage]

    def timings(self) -> dict[str, float]:
        return {"inference": round(self._last - self._start, 4), **self._laps}


def speed(generation: Generation, watch: Stopwatch) -> dict[str, float]:
    """How fast the steps were, and how many pictures shared a forward in the mean; nothing without steps.

    Where most of some steps was skipped, also of how many a picture in the mean.
    """
    steps = [sample.step for sample in generation.samples]
    if not any(steps):
        return {}
    rows = sum(sample.company for sample in generation.samples) / sum(steps)
    speed = max(steps) / max(watch.seconds("denoise"), 1e-4)
    reused = sum(len(sample.reused) for sample in generation.samples)
    skipped = {"steps_skipped": round(reused / len(steps), 2)} if reused else {}
    return {"steps_per_second": round(speed, 2), "rows": round(rows, 2), **skipped}


def measure(model: str, timings: Mapping[str, float]) -> None:
    """Tell the metrics of a request that went well."""
    for name, value in timings.items():
        if name == "steps_per_second":
            metrics.PACE.observe(value, model=model)
        elif name == "rows":
            metrics.COMPANY.observe(value, model=model)
        elif name not in NO_STAGES:
            metrics.STAGE.observe(value, model=model, stage=name)
