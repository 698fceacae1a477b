"""What is measured, where it is known."""

from collections.abc import Iterator

import pytest

from deployments import endings, metrics
from deployments.gauges import Gauges
from deployments.queue import Queue, Setback
from schemas.jobs import JobResult, Priority
from tests.support.jobs import Clock, make_job

Told = list[tuple[str, float, dict[str, str]]]

METRICS = [each for each in vars(metrics).values() if isinstance(each, metrics.Metric)]


@pytest.fixture
def told() -> Iterator[Told]:
    found: Told = []
    metrics.send_to(lambda metric, value, labels: found.append((metric.name, value, dict(labels))))
    yield found
    metrics.send_to(None)


def named(told: Told, metric: metrics.Metric) -> list[tuple[float, dict[str, str]]]:
    return [(value, labels) for name, value, labels in told if name == metric.name]


def test_names_are_those_that_prometheus_wants() -> None:
    assert len({each.name for each in METRICS}) == len(METRICS) > 15
    for metric in METRICS:
        assert metric.name.startswith("darkroom_") and metric.description
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert list(metric.buckets) == sorted(metric.buckets)


def test_a_metric_is_told_with_all_of_its_labels_or_not_at_all(told: Told) -> None:
    with pytest.raises(AssertionError, match="labels"):
        metrics.ACCEPTED.add(model="flux")
    assert told == []


async def test_the_gauges_tell_what_waits_and_runs_and_nought_where_nothing_does(
    queue: Queue, clock: Clock, told: Told
) -> None:
    for _ in range(3):
        await queue.submit(make_job())
    await queue.submit(make_job(priority=Priority.LOW))
    await queue.claim("flux", "me", 1)
    clock.now += 7
    gauges = Gauges()
    await gauges.measure(queue, ["flux", "sd"])
    labels = [{"model": "flux", "priority": "normal"}, {"model": "flux", "priority": "low"}]
    idle = [(0, {"model": "sd", "priority": name}) for name in ("normal", "low")]
    assert named(told, metrics.WAITING) == [(2, labels[0]), (1, labels[1]), *idle]
    assert named(told, metrics.RUNNING) == [(1, labels[0]), (0, labels[1]), *idle]
    assert named(told, metrics.OLDEST) == [(7, {"model": "flux"}), (0, {"model": "sd"})]
    told.clear()
    await gauges.measure(queue, ["flux"])
    assert told == [], "it was measured just now"


async def test_a_request_that_ended_is_counted_with_its_wait_and_its_run(
    queue: Queue, clock: Clock, told: Told
) -> None:
    job = make_job()
    await queue.submit(job)
    clock.now += 2
    [claim] = await queue.claim("flux", "me", 1)
    clock.now += 3
    await queue.finish(claim, JobResult.success({}, 3.0))
    record = await queue.get(job.request_id, job.tenant)
    assert record is not None
    endings.tell(record)
    assert named(told, metrics.WAIT) == [(2, {"model": "flux", "priority": "normal"})]
    assert named(told, metrics.RUN) == [(3, {"model": "flux"})]
    [(count, labels)] = named(told, metrics.ENDED)
    assert count == 1
    assert labels == {"model": "flux", "endpoint": job.endpoint_id, "status": "200", "error_type": ""}


async def test_what_ends_in_the_queue_is_counted_without_a_run(queue: Queue, told: Told) -> None:
    job = make_job()
    await queue.submit(job)
    await queue.cancel(job.request_id, job.tenant)
    [(_, labels)] = named(told, metrics.ENDED)
    assert labels["error_type"] == "client_cancelled"
    assert named(told, metrics.RUN) == []


async def test_what_is_put_back_has_not_ended(queue: Queue, told: Told) -> None:
    await queue.submit(make_job())
    [claim] = await queue.claim("flux", "me", 1)
    await queue.release(claim, Setback.CRASHED)
    assert named(told, metrics.ENDED) == []
