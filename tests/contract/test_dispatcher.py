"""The dispatcher over a real queue, with a model that does as it is told."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, cast

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from deployments.dispatcher import HASTE_S, Dispatcher
from deployments.queue import Queue, insistence, open_database
from deployments.queue.insistence import insist
from pipelines.registry import endpoint
from schemas.errors import InternalError, NotReady, StoreClosed, StoreDown, WorkerLost
from schemas.jobs import Backlog, CancelOutcome, Claim, Job, JobResult, Logged, Priority, State
from schemas.settings import Catalogue, LeaseSettings
from tests.support.jobs import ENDPOINT, OUTPUT, Clock, ScriptedModel, make_job

LEASE = LeaseSettings()
STYLED = "fal-ai/flux-lora/image-to-image"


def catalogue(*endpoints: str, **entry: float) -> Catalogue:
    return Catalogue.model_validate({"models": {"flux": {"endpoints": endpoints, "window": 3, **entry}}})


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def written(context: SpanContext | None) -> str:
    assert context is not None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


CATALOGUE = catalogue(ENDPOINT, STYLED)
Make = Callable[..., Awaitable[Dispatcher]]


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel()


@pytest.fixture
async def make_dispatcher(queue: Queue, model: ScriptedModel) -> AsyncIterator[Make]:
    """Dispatchers that are closed before the queue is."""
    made: list[Dispatcher] = []

    async def make(lease: LeaseSettings = LEASE, served: Catalogue = CATALOGUE) -> Dispatcher:
        made.append(Dispatcher(queue, lease, model.connect, lambda name: endpoint(name).input_type()))
        await made[-1].configure(served)
        return made[-1]

    yield make
    for dispatcher in made:
        await dispatcher.close()


@pytest.fixture
async def dispatcher(make_dispatcher: Make) -> Dispatcher:
    return await make_dispatcher()


async def end(queue: Queue, job: Job) -> JobResult:
    async def watch() -> JobResult:
        async for snapshot in queue.watch(job.request_id, job.tenant):
            if snapshot.record.result is not None:
                return snapshot.record.result
        raise AssertionError("unknown job")

    return await asyncio.wait_for(watch(), 20)


async def ended(*dispatchers: Dispatcher) -> None:
    """Wait until nothing runs."""
    while tasks := [run.task for each in dispatchers for run in each._runs.values()]:
        await asyncio.wait(tasks)


async def end_past_backoffs(queue: Queue, job: Job, clock: Clock) -> JobResult:
    ending = asyncio.create_task(end(queue, job))
    while not ending.done():
        record = await queue.get(job.request_id, job.tenant)
        if record is not None and record.state == State.QUEUED:
            clock.now += 20  # less than a lease, for it may be claimed by now
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


async def test_a_worker_hears_how_long_its_job_has_waited(
    queue: Queue, make_dispatcher: Make, model: ScriptedModel, clock: Clock
) -> None:
    job = make_job()
    await queue.submit(job)
    clock.now += 7
    await make_dispatcher()
    model.open.set()
    assert (await end(queue, job)).status == 200
    assert model.waited == [7]


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


async def test_a_window_full_of_low_priority_has_room_for_normal_ones(
    queue: Queue, make_dispatcher: Make, model: ScriptedModel
) -> None:
    low = [make_job(priority=Priority.LOW) for _ in range(4)]
    for job in low:
        await queue.submit(job)
    await make_dispatcher()
    await asyncio.wait_for(model.began.acquire(), 10)
    normal = [make_job() for _ in range(3)]
    for job in normal:
        await queue.submit(job)
    for _ in range(2):
        await asyncio.wait_for(model.began.acquire(), 10)
    assert model.order == [low[0].request_id, *(job.request_id for job in normal[:2])]
    assert model.backlogs[0] == Backlog(waiting=3, low=4)
    model.open.set()
    for job in (*low, *normal):
        assert (await end(queue, job)).status == 200


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


async def test_every_start_of_a_job_is_part_of_its_trace(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, clock: Clock, spans: InMemorySpanExporter
) -> None:
    model.failures = [WorkerLost("gone")]
    model.open.set()
    job = make_job(traceparent=PARENT)
    await queue.submit(job)
    assert (await end_past_backoffs(queue, job, clock)).status == 200
    await ended(dispatcher)
    first, second = [each for each in spans.get_finished_spans() if each.name == "dispatch"]
    assert [written(each.parent) for each in (first, second)] == [PARENT, PARENT]
    assert [written(each.context) for each in (first, second)] == model.traceparents
    numbers = [
        {name: each.attributes[name] for name in ("darkroom.attempt", "darkroom.fence")}
        for each in (first, second)
        if each.attributes is not None
    ]
    assert numbers == [
        {"darkroom.attempt": 1, "darkroom.fence": 1},
        {"darkroom.attempt": 2, "darkroom.fence": 2},
    ]
    assert first.attributes is not None and second.attributes is not None
    assert (first.attributes["error.type"], first.status.is_ok) == (WorkerLost.error_type, False)
    assert (second.attributes["http.response.status_code"], second.status.is_ok) == (200, True)
    assert "a cat" not in str([(each.attributes, each.events) for each in (first, second)])


async def test_a_trace_goes_on_with_the_next_dispatcher(
    queue: Queue, make_dispatcher: Make, model: ScriptedModel, clock: Clock, spans: InMemorySpanExporter
) -> None:
    job = make_job(traceparent=PARENT)
    await queue.submit(job)
    clock.now += 7
    older = await make_dispatcher()
    await asyncio.wait_for(model.began.acquire(), 10)
    await older.close()
    model.open.set()
    newer = await make_dispatcher()
    assert (await end(queue, job)).status == 200
    await ended(newer)
    told = spans.get_finished_spans()
    assert {written(each.parent) for each in told} == {PARENT}
    waited, stopped, *_, done = told
    assert (waited.name, stopped.name, done.name) == ("queue", "dispatch", "dispatch")
    assert waited.start_time is not None and waited.end_time is not None
    assert (waited.end_time - waited.start_time) / 1e9 == pytest.approx(7.0, abs=1e-3)
    assert stopped.attributes is not None and stopped.attributes["error.type"] == "cancelled"
    assert done.status.is_ok


async def test_waiting_for_a_worker_that_is_not_there_is_no_start_in_the_trace(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, clock: Clock, spans: InMemorySpanExporter
) -> None:
    model.failures = [NotReady("nobody"), NotReady("nobody")]
    model.open.set()
    job = make_job(traceparent=PARENT)
    await queue.submit(job)
    assert (await end_past_backoffs(queue, job, clock)).status == 200
    await ended(dispatcher)
    assert [each.name for each in spans.get_finished_spans()] == ["queue", "dispatch"]


async def test_a_job_that_kills_every_worker_is_given_up(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, clock: Clock
) -> None:
    model.failures = [WorkerLost("gone")] * 9
    job = make_job()
    await queue.submit(job)
    ended = await end_past_backoffs(queue, job, clock)
    assert ended.error_type == "runner_disconnected"
    assert len(model.order) == 3


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), TimeoutError("not of our clocks")])
async def test_what_nobody_expected_is_taken_for_a_lost_worker(
    error: Exception, queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, clock: Clock
) -> None:
    model.failures = [error]
    model.open.set()
    job = make_job()
    await queue.submit(job)
    assert (await end_past_backoffs(queue, job, clock)).status == 200
    assert len(model.order) == 2


async def test_a_worker_that_ends_without_a_result_is_taken_for_lost(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    model.outcome = cast(Callable[[Job], JobResult], lambda job: None)
    model.open.set()
    job = make_job(max_retries=0)
    await queue.submit(job)
    assert (await end(queue, job)).error_type == "runner_disconnected"


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


async def test_closing_gives_back_what_runs(
    queue: Queue, model: ScriptedModel, make_dispatcher: Make
) -> None:
    first = await make_dispatcher()
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.began.acquire(), 10)
    await first.close()
    record = await queue.get(job.request_id, job.tenant)
    assert record is not None
    assert record.state == State.QUEUED
    model.open.set()
    await make_dispatcher()
    assert (await end(queue, job)).status == 200


async def test_a_job_taken_over_by_another_is_let_go(
    queue: Queue, model: ScriptedModel, clock: Clock, make_dispatcher: Make
) -> None:
    await make_dispatcher(replace_beats(LEASE))
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.began.acquire(), 10)
    ahead = Clock(clock.now + 31)  # for whom the lease has lapsed
    another = Queue(queue._database, LEASE, clock=ahead)
    await another.sweep()
    ahead.now += 60
    [taken] = await another.claim("flux", "another", 1)
    await asyncio.wait_for(model.stopped.wait(), 10)
    assert await queue.finish(taken, JobResult.success({}, 0.0))


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


@pytest.mark.parametrize("verb", ["waiting", "heartbeat"])
async def test_a_queue_that_cannot_be_asked_for_a_while_stops_nothing(
    queue: Queue, model: ScriptedModel, make_dispatcher: Make, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    works, failures, is_back = getattr(queue, verb), [StoreDown("disk full")] * 2, asyncio.Event()

    async def fails_at_first(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        is_back.set()
        return await works(*arguments)

    monkeypatch.setattr("deployments.dispatcher.IDLE_S", 0.01)
    monkeypatch.setattr(queue, verb, fails_at_first)
    dispatcher = await make_dispatcher(replace_beats(LEASE))
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.began.acquire(), 10)
    await asyncio.wait_for(is_back.wait(), 10)
    model.open.set()
    assert (await end(queue, job)).status == 200
    assert dispatcher.is_alive


async def test_a_database_that_is_away_for_longer_than_a_lease_costs_no_start(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.spoke.acquire(), 10)
    asked, looked, waiting = asyncio.Semaphore(0), asyncio.Semaphore(0), queue.waiting

    async def away(operation: Any) -> Any:
        asked.release()
        raise StoreDown("away")

    async def seen(*arguments: Any) -> Any:
        found = await waiting(*arguments)
        looked.release()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(queue._database, "read", away)
        patched.setattr(queue._database, "write", away)
        queue.wake()
        await asyncio.wait_for(asked.acquire(), 10)
        clock.now += LEASE.lease_s + 1
    monkeypatch.setattr(queue, "waiting", seen)
    for _ in range(2):
        queue.wake()
        await asyncio.wait_for(looked.acquire(), 10)
    model.open.set()
    assert (await end(queue, job)).status == 200
    assert len(model.order) == 1


async def test_what_is_overdue_by_the_clock_of_one_that_does_not_lead_makes_it_look_no_faster(
    queue: Queue, model: ScriptedModel, clock: Clock
) -> None:
    assert await queue.leads("upkeep", "another")
    dispatcher = Dispatcher(queue, LEASE, model.connect, lambda name: endpoint(name).input_type())
    await queue.submit(make_job(start_timeout_s=1.0))
    clock.now += 2  # for the leader it is not yet
    assert [await dispatcher._look() for _ in range(2)] == [HASTE_S] * 2


async def test_a_run_whose_lease_lapsed_unseen_is_stopped_when_the_job_is_claimed_again(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, clock: Clock
) -> None:
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.began.acquire(), 10)
    await asyncio.wait_for(model.spoke.acquire(), 10)  # else it is stopped by what it says
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


# -- what waits behind a full window


def styled(**fields: Any) -> Job:
    """A job that names weights."""
    named = {"prompt": "x", "image_url": "http://there/cat.png", "loras": [{"path": "ann/style"}]}
    return make_job(endpoint_id=STYLED, input=named, **fields)


async def submit(queue: Queue, *jobs: Job) -> list[str]:
    for job in jobs:
        await queue.submit(job)
    return [job.request_id for job in jobs]


async def begin(model: ScriptedModel, count: int) -> None:
    for _ in range(count):
        await asyncio.wait_for(model.began.acquire(), 10)


async def told(model: ScriptedModel, *request_ids: str) -> None:
    """Wait until the model was told of these, in this order, and of no others."""
    async with asyncio.timeout(10):
        while len(model.prefetched) < len(request_ids):
            await asyncio.sleep(0.01)
    assert model.prefetched == [*request_ids]


async def test_the_model_hears_of_what_waits_once_and_in_its_order(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    await dispatcher.configure(catalogue(STYLED, prefetch=0))
    running = [styled() for _ in range(3)]
    await submit(queue, *running)
    await begin(model, 3)
    low, normal = styled(priority=Priority.LOW), styled()
    both = await submit(queue, low, normal)
    await dispatcher.configure(catalogue(STYLED))
    queue.wake()
    await told(model, *reversed(both))
    [last] = await submit(queue, styled())
    await told(model, *reversed(both), last)
    model.open.set()
    for job in (*running, low, normal):
        assert (await end(queue, job)).status == 200
    assert model.prefetched == [*reversed(both), last]


async def test_the_model_hears_only_of_jobs_that_name_weights(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    await submit(queue, *(make_job() for _ in range(3)))
    await begin(model, 3)
    bare = {"prompt": "x", "image_url": "http://there/cat.png"}
    await submit(queue, make_job(), make_job(endpoint_id=STYLED, input=bare))
    await submit(queue, make_job(endpoint_id=STYLED, input={"as": "an older server took it"}))
    await told(model, *await submit(queue, styled()))


async def test_the_model_hears_of_the_next_few_only_and_of_others_as_the_queue_moves(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    await dispatcher.configure(catalogue(STYLED, window=1, prefetch=2))
    model.is_deaf = True
    jobs = [styled() for _ in range(6)]
    ids = await submit(queue, *jobs)
    await told(model, *ids[1:3])
    for job in jobs[3:]:
        await queue.cancel(job.request_id, job.tenant)
    await queue.cancel(jobs[1].request_id, jobs[1].tenant)
    [late] = await submit(queue, styled())
    await told(model, *ids[1:3], late)
    assert model.calling == 2  # the cancelled one's call was given up
    assert [*dispatcher._told["flux"]] == [ids[2], late]


@pytest.mark.parametrize(
    ("served", "waiting"),
    [
        (catalogue(ENDPOINT), 5),  # no endpoint has a field for weights
        (catalogue(ENDPOINT, STYLED, prefetch=0), 5),  # off
        (catalogue(ENDPOINT, STYLED, window=6), 5),  # the window has room
    ],
)
async def test_nothing_is_read_where_nothing_is_fetched_ahead(
    queue: Queue,
    dispatcher: Dispatcher,
    model: ScriptedModel,
    monkeypatch: pytest.MonkeyPatch,
    served: Catalogue,
    waiting: int,
) -> None:
    reads: list[str] = []

    async def upcoming(name: str, limit: int) -> list[Job]:
        reads.append(name)
        return []

    monkeypatch.setattr(queue, "upcoming", upcoming)
    await dispatcher.configure(served)
    model.open.set()
    jobs = [make_job(endpoint_id=served.models["flux"].endpoints[-1]) for _ in range(waiting)]
    await submit(queue, *jobs)
    for job in jobs:
        assert (await end(queue, job)).status == 200
    assert reads == []


async def test_a_prefetch_that_never_comes_back_delays_no_job(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    model.is_deaf = True
    jobs = [styled() for _ in range(8)]
    ids = await submit(queue, *jobs)
    await begin(model, 3)
    await told(model, *ids[3:])
    model.open.set()
    for job in jobs:
        assert (await end(queue, job)).status == 200
    assert model.order == ids


async def test_a_prefetch_that_fails_harms_no_job(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    running, waiting = [styled() for _ in range(3)], styled()
    await submit(queue, *running)
    await begin(model, 3)
    model.failures = [NotReady("deploying")]
    await told(model, *await submit(queue, waiting))
    assert not model.failures
    model.open.set()
    for job in (*running, waiting):
        assert (await end(queue, job)).status == 200
    assert len(model.order) == 4


async def test_another_catalogue_tells_anew_and_closing_gives_the_calls_up(
    queue: Queue, model: ScriptedModel, make_dispatcher: Make
) -> None:
    dispatcher = await make_dispatcher(served=catalogue(STYLED, window=1))
    model.is_deaf = True
    _, waiting = await submit(queue, styled(), styled())
    await told(model, waiting)
    await dispatcher.configure(catalogue(ENDPOINT, STYLED, window=1))
    queue.wake()
    await told(model, waiting, waiting)
    await dispatcher.close()
    assert model.calling == 0


async def test_what_runs_for_too_long_is_stopped_and_fails_for_good(
    queue: Queue, make_dispatcher: Make, model: ScriptedModel
) -> None:
    await make_dispatcher(served=catalogue(ENDPOINT, run_limit_s=0.05))
    job = make_job()
    await queue.submit(job)
    result = await end(queue, job)
    assert (result.status, result.error_type, result.retryable) == (504, "request_timeout", True)
    await asyncio.wait_for(model.stopped.wait(), 20)
    assert model.running == 0
    assert len(model.order) == 1


@pytest.mark.parametrize("speech", ["step 1/2", None], ids=["an event", "the result"])
async def test_an_outage_of_the_database_is_no_time_of_the_run_and_no_silence_of_the_worker(
    queue: Queue,
    make_dispatcher: Make,
    model: ScriptedModel,
    monkeypatch: pytest.MonkeyPatch,
    speech: str | None,
) -> None:
    is_back, tried = asyncio.Event(), asyncio.Event()
    verb = "record" if speech else "finish"
    works = getattr(queue, verb)

    async def is_away(*arguments: Any) -> bool:
        tried.set()
        await is_back.wait()
        return bool(await works(*arguments))

    monkeypatch.setattr("deployments.dispatcher.SILENCE_S", 0.1)
    monkeypatch.setattr(queue, verb, is_away)
    model.events = (Logged(speech),) if speech else ()
    model.open.set()
    await make_dispatcher(LeaseSettings(lease_s=0.1, heartbeat_s=0.05), catalogue(ENDPOINT, run_limit_s=0.2))
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(tried.wait(), 10)
    await asyncio.sleep(0.5)
    is_back.set()
    assert (await end(queue, job)).status == 200
    assert len(model.order) == 1


async def test_waiting_for_a_replica_to_start_is_no_running(
    queue: Queue, make_dispatcher: Make, model: ScriptedModel
) -> None:
    await make_dispatcher(served=catalogue(ENDPOINT, run_limit_s=0.05))
    model.events = ()  # Serve is still starting one
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.spoke.acquire(), 10)
    await asyncio.sleep(0.2)
    model.open.set()
    assert (await end(queue, job)).status == 200


async def test_the_model_hears_how_many_wait_behind_a_full_window(
    queue: Queue, make_dispatcher: Make, model: ScriptedModel
) -> None:
    jobs = [make_job() for _ in range(8)]
    for job in jobs:
        await queue.submit(job)
    await make_dispatcher()
    model.open.set()
    for job in jobs:
        await end(queue, job)
    waiting = [each.waiting for each in model.backlogs]
    assert waiting[:3] == [5, 5, 5]
    assert waiting[3:] == sorted(waiting[3:], reverse=True)
    assert waiting[-1] == 0


@pytest.mark.parametrize("start_timeout_s", [None, 60], ids=["whenever", "in time"])
async def test_a_worker_that_speaks_when_all_is_over_changes_nothing(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, start_timeout_s: float | None
) -> None:
    model.events = ()
    job = make_job(start_timeout_s=start_timeout_s)
    await queue.submit(job)
    await asyncio.wait_for(model.spoke.acquire(), 10)
    first = JobResult.success({"first": True}, 0.5)
    assert await queue.finish(dispatcher._runs[job.request_id].claim, first)
    model.open.set()
    await ended(dispatcher)
    assert await end(queue, job) == first


async def test_of_a_request_that_is_swept_by_then_no_end_is_told(
    dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deployments.endings")
    await dispatcher._report(make_job())
    assert not caplog.records


async def test_an_end_that_cannot_be_read_is_no_fault_of_the_run(
    queue_url: str, model: ScriptedModel, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Queue(open_database(queue_url), LEASE)
    dispatcher = Dispatcher(queue, LEASE, model.connect, lambda name: endpoint(name).input_type())
    job = make_job()

    def fails(connection: Connection) -> None:
        raise OperationalError("SELECT", {}, Exception("disk I/O error\nmore of it"))

    async def get(request_id: str, tenant: str) -> Any:
        return await queue._database.read(fails)

    queue.get = get  # type: ignore[method-assign]
    await dispatcher._report(job)
    [line] = [each.getMessage() for each in caplog.records]
    assert job.request_id in line and line.endswith("disk I/O error")
    await dispatcher.close()  # which has nothing to stop: it never got a catalogue
    await queue.close()


async def test_nobody_insists_on_a_database_that_this_process_has_closed(
    queue: Queue, queue_url: str
) -> None:
    await queue.submit(make_job())
    [claim] = await queue.claim("flux", "one", 1)
    closed = Queue(open_database(queue_url), LEASE)
    await closed.close()
    result = JobResult.success({}, 0.5)
    with pytest.raises(StoreClosed):
        await asyncio.wait_for(insist(partial(closed.finish, claim, result)), 10)
    assert await insist(partial(queue.finish, claim, result))


async def test_who_insists_for_long_tells_of_it_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(insistence, "PAUSE_S", 0)
    failures = [StoreDown("away")] * 3

    async def write() -> bool:
        if failures:
            raise failures.pop()
        return True

    assert await insist(write)
    [line] = [each.getMessage() for each in caplog.records if each.name == insistence.__name__]
    assert line.endswith("away")


@pytest.mark.parametrize("queues", [False, True])
async def test_a_job_that_no_worker_begins_in_time_fails_at_its_start_deadline(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel, queues: bool
) -> None:
    model.events, model.queues = (), queues  # it waits behind others and says so, or nothing
    job = make_job(start_timeout_s=0.1)
    await queue.submit(job)
    ended = await end(queue, job)
    assert (ended.status, ended.error_type) == (504, "request_timeout")
    await asyncio.wait_for(model.stopped.wait(), 10)


async def test_what_is_claimed_while_the_dispatcher_closes_goes_to_another_at_once(
    queue: Queue, make_dispatcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, claimed, told = queue.claim, asyncio.Event(), asyncio.Event()

    async def slow(*args: Any) -> list[Claim]:
        claims = await claim(*args)
        if claims:
            claimed.set()
            await told.wait()
        return claims

    monkeypatch.setattr(queue, "claim", slow)
    dispatcher, job = await make_dispatcher(), make_job()
    await queue.submit(job)
    await asyncio.wait_for(claimed.wait(), 10)
    closing = asyncio.create_task(dispatcher.close())
    await asyncio.sleep(0)  # it has begun
    told.set()
    await closing
    record = await queue.get(job.request_id, job.tenant)
    assert record is not None
    assert record.state == State.QUEUED
    [again] = await claim("flux", "another", 1)
    assert (again.job.request_id, again.attempt) == (job.request_id, 1)


async def test_a_request_that_cannot_be_ended_stops_no_other(
    queue: Queue, make_dispatcher: Make, model: ScriptedModel, clock: Clock
) -> None:
    """Its webhook cannot be kept, where an index of PostgreSQL takes no text of this length."""
    hook = f"https://example.invalid/{secrets.token_urlsafe(5000)}"
    await queue.submit(make_job(model="elsewhere", start_timeout_s=5.0, webhook_url=hook))
    clock.now += 6
    await make_dispatcher()
    model.open.set()
    job = make_job()
    await queue.submit(job)
    assert (await end(queue, job)).status == 200


@pytest.mark.parametrize("took_s", [6, 60], ids=["its deadline", "its lease"])
async def test_a_job_whose_claim_outlasts_its_start_deadline_reaches_no_worker(
    took_s: int,
    queue: Queue,
    dispatcher: Dispatcher,
    model: ScriptedModel,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim = queue.claim

    async def slow(*args: Any) -> list[Claim]:
        claims = await claim(*args)
        clock.now += took_s * len(claims)
        await queue.sweep()  # another's, who ends it where the lease has lapsed
        return claims

    monkeypatch.setattr(queue, "claim", slow)
    model.open.set()
    job = make_job(start_timeout_s=5.0)
    await queue.submit(job)
    ended = await end(queue, job)
    assert (ended.status, ended.error_type) == (504, "request_timeout")
    assert not model.order


async def test_a_worker_that_falls_silent_is_taken_for_lost(
    queue: Queue, model: ScriptedModel, clock: Clock, make_dispatcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.dispatcher.SILENCE_S", 0.2)
    await make_dispatcher(LeaseSettings(lease_s=0.2, heartbeat_s=0.05))
    job = make_job()
    await queue.submit(job)
    for _ in range(2):
        await asyncio.wait_for(model.spoke.acquire(), 10)  # and then nothing more
        await asyncio.wait_for(model.stopped.wait(), 10)
        model.stopped.clear()
        clock.now += 20  # the backoff
        queue.wake()
    model.open.set()
    assert (await end_past_backoffs(queue, job, clock)).status == 200


async def test_a_worker_that_has_not_begun_may_be_silent(
    queue: Queue, model: ScriptedModel, make_dispatcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that Serve is still starting."""
    monkeypatch.setattr("deployments.dispatcher.SILENCE_S", 0.2)
    await make_dispatcher(LeaseSettings(lease_s=0.2, heartbeat_s=0.05))
    model.events = ()
    job = make_job()
    await queue.submit(job)
    await asyncio.wait_for(model.spoke.acquire(), 10)
    await asyncio.sleep(0.5)
    model.open.set()
    assert (await end(queue, job)).status == 200
    assert len(model.order) == 1


async def test_a_job_that_began_in_time_may_run_for_longer(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    job = make_job(start_timeout_s=1.0)
    await queue.submit(job)
    while not await queue.events(job.request_id):
        await asyncio.sleep(0.01)
    await asyncio.sleep(1.1)
    model.open.set()
    assert (await end(queue, job)).status == 200


async def test_what_is_not_to_be_retried_ends_with_its_first_worker(
    queue: Queue, dispatcher: Dispatcher, model: ScriptedModel
) -> None:
    model.failures = [WorkerLost("gone")]
    job = make_job(max_retries=0)
    await queue.submit(job)
    result = await end(queue, job)
    assert (result.status, result.error_type) == (503, "runner_disconnected")
    assert len(model.order) == 1


class Ends(logging.Handler):
    """What the log says of requests that have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        if fields := record.__dict__.get("fields"):
            self.told.put_nowait(fields)


async def test_t22_a_request_that_ended_has_one_line_in_the_log(
    queue: Queue,
    model: ScriptedModel,
    make_dispatcher: Make,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "deployments.endings")
    log, ends = logging.getLogger("deployments.endings"), Ends()
    log.addHandler(ends)
    dispatcher = await make_dispatcher()
    model.open.set()
    for job, failure, end_of_it in (
        (make_job(tenant="alice"), None, (200, None)),
        (make_job(tenant="bob", max_retries=0), WorkerLost("gone"), (503, "runner_disconnected")),
        (make_job(tenant="carol", endpoint_id=STYLED), InternalError("bad"), None),
    ):
        model.failures = [failure] if isinstance(failure, WorkerLost) else []
        model.outcome = lambda job, failure=failure: (  # type: ignore[misc]
            JobResult.failure(failure) if failure else JobResult.success(OUTPUT, 0.5)
        )
        await queue.submit(job)
        told = await asyncio.wait_for(ends.told.get(), 20)
        assert (told["request_id"], told["endpoint"]) == (job.request_id, job.endpoint_id)
        assert (told["tenant"], told["model"], told["attempts"]) == (job.tenant, "flux", 1)
        assert (told["status"], told["error_type"]) == (end_of_it or (500, "internal_server_error"))
        assert told["queue_s"] >= 0
    await dispatcher.close()
    cancelled, late = make_job(), make_job(start_timeout_s=1.0)
    for job in (cancelled, late):
        await queue.submit(job)
    await queue.cancel(cancelled.request_id, cancelled.tenant)
    await queue.cancel(cancelled.request_id, cancelled.tenant)
    clock.now += 1
    assert await queue.sweep() == 1
    for job, error_type in ((cancelled, "client_cancelled"), (late, "request_timeout")):
        told = await asyncio.wait_for(ends.told.get(), 20)
        assert (told["request_id"], told["error_type"], told["attempts"]) == (job.request_id, error_type, 0)
    log.removeHandler(ends)
    assert ends.told.empty()
