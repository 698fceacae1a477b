"""The dispatcher over a real queue, with a model that does as it is told."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from deployments.dispatcher import Dispatcher
from deployments.queue import Queue
from schemas.errors import InternalError, NotReady, StoreDown, WorkerLost
from schemas.jobs import CancelOutcome, Job, JobResult, Logged, State
from schemas.settings import Catalogue, LeaseSettings
from tests.support.jobs import ENDPOINT, Clock, ScriptedModel, make_job

LEASE = LeaseSettings()
CATALOGUE = Catalogue.model_validate({"models": {"flux": {"endpoints": [ENDPOINT], "window": 3}}})


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel()


@pytest.fixture
async def dispatcher(queue: Queue, model: ScriptedModel) -> AsyncIterator[Dispatcher]:
    dispatcher = Dispatcher(queue, LEASE, model.connect)
    await dispatcher.configure(CATALOGUE)
    yield dispatcher
    await dispatcher.close()


async def end(queue: Queue, job: Job) -> JobResult:
    async def watch() -> JobResult:
        async for snapshot in queue.watch(job.request_id, job.tenant):
            if snapshot.record.result is not None:
                return snapshot.record.result
        raise AssertionError("unknown job")

    return await asyncio.wait_for(watch(), 20)


async def end_past_backoffs(queue: Queue, job: Job, clock: Clock) -> JobResult:
    ending = asyncio.create_task(end(queue, job))
    while not ending.done():
        clock.now += 60
        queue.wake()
        await asyncio.wait([ending], timeout=0.05)
    return await ending


async def test_a_job_runs_and_its_events_are_kept(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    model.open.set()
    job = make_job()
    await queue.submit(job)
    assert (await end(queue, job)).status == 200
    lines = [e.event.message for e in await queue.events(job.request_id) if isinstance(e.event, Logged)]
    assert lines == ["step 1/2", "step 2/2"]


async def test_no_more_than_the_window_is_handed_over(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    jobs = [make_job() for _ in range(8)]
    for job in jobs:
        await queue.submit(job)
    for _ in range(3):
        await asyncio.wait_for(model.began.acquire(), 10)
    record = await queue.get(jobs[7].request_id, jobs[7].tenant)
    assert record is not None
    assert record.position == 4
    model.open.set()
    for job in jobs:
        assert (await end(queue, job)).status == 200
    assert model.most == 3
    assert model.order == [job.request_id for job in jobs]


async def test_a_cancel_stops_the_running_job(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.began.acquire(), 10)
    assert await queue.cancel(job.request_id, job.tenant) == CancelOutcome.REQUESTED
    assert (await end(queue, job)).error_type == "client_cancelled"
    await asyncio.wait_for(model.stopped.wait(), 10)
    assert model.running == 0


async def test_a_job_whose_worker_dies_is_run_again(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, clock: Clock
) -> None:
    model.failures = [WorkerLost("gone"), WorkerLost("gone")]
    model.open.set()
    job = make_job()
    await queue.submit(job)
    assert (await end_past_backoffs(queue, job, clock)).status == 200
    assert len(model.order) == 3


async def test_a_job_that_kills_every_worker_is_given_up(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, clock: Clock
) -> None:
    model.failures = [WorkerLost("gone")] * 9
    job = make_job()
    await queue.submit(job)
    ended = await end_past_backoffs(queue, job, clock)
    assert ended.error_type == "runner_disconnected"
    assert len(model.order) == 3


async def test_a_model_that_is_not_there_yet_costs_no_attempt_limit(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, clock: Clock
) -> None:
    model.failures = [NotReady("deploying")] * 5
    model.open.set()
    job = make_job()
    await queue.submit(job)
    assert (await end_past_backoffs(queue, job, clock)).status == 200


async def test_an_error_of_the_model_is_the_result_and_not_tried_again(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    model.outcome = lambda job: JobResult.failure(InternalError("broken"))
    model.open.set()
    job = make_job()
    await queue.submit(job)
    ended = await end(queue, job)
    assert (ended.status, ended.error) == (500, "broken")
    assert len(model.order) == 1


async def test_closing_gives_back_what_runs(queue: Queue, model: ScriptedModel) -> None:
    first = Dispatcher(queue, LEASE, model.connect)
    await first.configure(CATALOGUE)
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.began.acquire(), 10)
    await first.close()
    record = await queue.get(job.request_id, job.tenant)
    assert record is not None
    assert record.state == State.QUEUED
    model.open.set()
    second = Dispatcher(queue, LEASE, model.connect)
    await second.configure(CATALOGUE)
    assert (await end(queue, job)).status == 200
    await second.close()


async def test_a_job_taken_over_by_another_is_let_go(
    queue: Queue, model: ScriptedModel, clock: Clock
) -> None:
    fast = replace_beats(LEASE)
    dispatcher = Dispatcher(queue, fast, model.connect)
    await dispatcher.configure(CATALOGUE)
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.began.acquire(), 10)
    clock.now += 31  # as if this dispatcher had been stopped past its lease
    await queue.sweep()
    clock.now += 60
    [taken] = await queue.claim("flux", "another", 1)
    await asyncio.wait_for(model.stopped.wait(), 10)
    assert await queue.finish(taken, JobResult.success({}, 0.0))
    await dispatcher.close()


@pytest.mark.parametrize("verb", ["finish", "record", "release"])
async def test_a_database_that_fails_for_a_while_costs_time_only(
    queue: Queue,
    dispatcher: Dispatcher,
    model: ScriptedModel,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    works, failures = getattr(queue, verb), [StoreDown("disk full")] * 2

    async def fails_at_first(*arguments: Any, **options: Any) -> bool:
        if failures:
            raise failures.pop()
        return bool(await works(*arguments, **options))

    monkeypatch.setattr("deployments.dispatcher.IDLE_S", 0.01)
    monkeypatch.setattr(queue, verb, fails_at_first)
    model.failures = [WorkerLost("gone")] if verb == "release" else []
    model.open.set()
    job = make_job()
    await queue.submit(job)
    assert (await end_past_backoffs(queue, job, clock)).status == 200
    assert not failures


async def test_a_run_whose_lease_lapsed_unseen_is_stopped_when_the_job_is_claimed_again(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, clock: Clock
) -> None:
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.began.acquire(), 10)
    clock.now += 31
    await queue.sweep()
    clock.now += 60
    queue.wake()  # the dispatcher claims it anew
    await asyncio.wait_for(model.began.acquire(), 10)
    await asyncio.wait_for(model.stopped.wait(), 10)
    assert model.running == 1
    assert len(dispatcher._runs) == 1
    model.open.set()
    assert (await end(queue, job)).status == 200


def replace_beats(lease: LeaseSettings) -> LeaseSettings:
    return lease.model_copy(update={"heartbeat_s": 0.05})
