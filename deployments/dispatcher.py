"""Claims jobs, hands them to model workers, and writes down what comes back.

It knows the queue and a way to call a worker, nothing of Ray or HTTP. At most `window` requests of a
model are handed over at once: enough that Serve sees the demand and scales, few enough that what
waits stays in the queue, where it can be cancelled and ordered. The model hears how many those are,
which its autoscaling counts, and of the next few, so that the weights they name are there when their
turn comes.
"""

import asyncio
import contextlib
import contextvars
import logging
import os
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from deployments import crash, endings, logs, metrics, traces
from deployments.gauges import Gauges
from deployments.queue import Queue, Setback
from deployments.queue.insistence import insist
from schemas.assets import takes_weights, weights
from schemas.errors import (
    DarkroomError,
    NotReady,
    RunTimeout,
    StartTimeout,
    StoreDown,
    WorkerLost,
)
from schemas.jobs import WORD_S, Backlog, Claim, Job, JobResult, Priority, Update
from schemas.settings import Catalogue, LeaseSettings, ModelEntry

logger = logging.getLogger(__name__)

IDLE_S = 1.0  # the longest time between two looks at the queue
HASTE_S = (
    0.01  # the shortest, without a ring: by our clock something may be overdue that is its leader's to end
)
MOST_COUNTED = 1000  # waiting requests of a priority: nobody has replicas for more
KEPT = 2  # places of a window that no request of low priority takes
SILENCE_S = 5 * WORD_S  # no worker is taken for lost sooner

Hearing = AbstractContextManager[None]


class ModelHandle(Protocol):
    """A way to call the workers of one model."""

    def generate(self, job: Job, backlog: Backlog) -> AsyncGenerator[Update]:
        """Run a job; the last update has its result.

        Raises WorkerLost when the worker died, NotReady when there is none to call. Closing the
        iterator stops the job within a step.
        """

    async def prefetch(self, job: Job) -> None:
        """Have a worker begin to fetch the weights of a job that will come. Raises as `generate` does."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A claim being run."""

    claim: Claim
    task: asyncio.Task[None]


class Dispatcher:
    """One per front.

    `connect` gives the handle of a model by its application's name, `input_type` the Input of an
    endpoint by its id.
    """

    def __init__(
        self,
        queue: Queue,
        lease: LeaseSettings,
        connect: Callable[[str], ModelHandle],
        input_type: Callable[[str], type[BaseModel]],
    ) -> None:
        self.owner = f"{socket.gethostname()}/{os.getpid()}/{uuid4().hex[:8]}"
        self._queue = queue
        self._lease = lease
        self._connect = connect
        self._input_type = input_type
        self._windows: dict[str, int] = {}
        self._limits: dict[str, float | None] = {}  # seconds that a request of a model may run
        self._sights: dict[str, int] = {}  # how many waiting requests of a model are looked at
        self._told: dict[str, dict[str, asyncio.Task[None]]] = {}  # of those: model → request id → the call
        self._runs: dict[str, Run] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._next_sweep = 0.0  # by the queue's clock
        self._is_closing = False
        self._gauges = Gauges()

    async def configure(self, catalogue: Catalogue) -> None:
        """Serve this catalogue from now on. What runs goes on; what waits follows its endpoint.

        Raises KeyError for an endpoint that does not exist.
        """
        sights = {name: self._sight(entry) for name, entry in catalogue.models.items()}
        await self._queue.reroute(catalogue.routes())
        self._windows = {name: entry.window for name, entry in catalogue.models.items()}
        self._limits = {name: entry.run_limit_s for name, entry in catalogue.models.items()}
        self._sights = sights
        self._forget()  # what waits may belong to another model now
        if not self._loops:
            self._loops = [_detached(self._dispatch()), _detached(self._renew())]

    @property
    def is_alive(self) -> bool:
        return self._queue.is_alive and not any(loop.done() for loop in self._loops)

    async def close(self) -> None:
        """Stop, and give back what runs: another dispatcher takes it at once."""
        self._is_closing = True
        self._queue.wake()
        if self._loops:
            dispatching, renewing = self._loops
            renewing.cancel()
            await asyncio.wait((dispatching, renewing))
        self._forget()
        for run in list(self._runs.values()):
            await self._stop(run)

    async def _dispatch(self) -> None:
        """Look, act, wait for a change; until closing, for a look that is left off may have claimed."""
        pause, was_away = 0.0, False
        while True:
            await self._queue.changed(pause)
            if self._is_closing:
                return
            try:
                if was_away:  # its leases have lapsed perhaps, which a look would take for a lost worker
                    await self._beat()
                pause = await self._look()
                metrics.STORE_UP.set(1)
                was_away = False
            except Exception:
                logger.exception("the queue could not be read")
                metrics.STORE_UP.set(0)
                pause, was_away = IDLE_S, True

    async def _look(self) -> float:
        """Do what there is to do. Returns the seconds until something falls due."""
        now = self._queue.now()
        is_due = now >= self._next_sweep
        waiting = await self._queue.waiting(self.owner, self._windows)
        self._next_sweep = min(now + IDLE_S, waiting.next_due or now + IDLE_S)
        for request_id in waiting.cancelled & self._runs.keys():
            self._runs[request_id].task.cancel()
        full = [model for model in waiting.models if await self._fill(model)]
        for model in full:
            await self._foresee(model)
        if is_due and await self._queue.leads("upkeep", self.owner):  # last: where it fails, the rest is done
            await self._queue.sweep()
            await self._gauges.measure(self._queue, self._windows)
        return min(IDLE_S, max(HASTE_S, self._next_sweep - self._queue.now()))  # the clock may be set

    async def _fill(self, model: str) -> bool:
        """Hand over what the window has room for. Returns whether it is full."""
        window = self._windows[model]
        running = [run.claim.job for run in self._runs.values() if run.claim.job.model == model]
        room, low_room = window - len(running), max(1, window - KEPT) - _low_ones(running)
        claims = await self._queue.claim(model, self.owner, room, low_room) if room > 0 else []
        low = _low_ones(claim.job for claim in claims)
        is_full = len(claims) >= room or low >= low_room
        backlog = await self._backlog(model, _low_ones(running) + low, is_full) if claims else Backlog()
        for claim in claims:
            crash.point("dispatcher.starts")
            self._start(claim, backlog)
        return is_full

    async def _backlog(self, model: str, low: int, is_full: bool) -> Backlog:
        """`low`: how many of low priority are handed over. While there is room, nothing waits."""
        if not is_full:
            return Backlog(low=low)
        by_priority = {each: await self._queue.backlog(model, each, MOST_COUNTED) for each in Priority}
        return Backlog(sum(by_priority.values()), low + by_priority[Priority.LOW])

    async def _foresee(self, model: str) -> None:
        """Tell the model of the requests that come next, of each once. Waits for no answer."""
        sight = self._sights.get(model, 0)
        if not sight:
            return
        jobs = await self._queue.upcoming(model, sight)
        told = self._told.setdefault(model, {})
        for request_id in told.keys() - {job.request_id for job in jobs}:
            told.pop(request_id).cancel()  # it waits no longer
        for job in jobs:
            if job.request_id not in told:
                told[job.request_id] = _detached(self._tell(job))

    async def _tell(self, job: Job) -> None:
        """Nothing comes of what is wrong here: the request says it when it runs."""
        try:
            request = self._input_type(job.endpoint_id).model_validate(job.input)
            if weights(request):
                await self._connect(job.model).prefetch(job)
        except ValidationError:
            logger.info("request %s is not valid any more", job.request_id)
        except DarkroomError as error:
            logger.info("the weights of request %s are not fetched ahead: %s", job.request_id, error.message)

    def _forget(self) -> None:
        """Forget what was told, and leave off telling."""
        for told in self._told.values():
            for call in told.values():
                call.cancel()
        self._told.clear()

    def _sight(self, entry: ModelEntry) -> int:
        """How many waiting requests to look at: none where no endpoint has a field for weights."""
        takes = any(takes_weights(self._input_type(endpoint_id)) for endpoint_id in entry.endpoints)
        return entry.prefetch if takes else 0

    def _start(self, claim: Claim, backlog: Backlog) -> None:
        request_id = claim.job.request_id
        if older := self._runs.get(request_id):  # our lease on it had lapsed unseen
            older.task.cancel()
        run = self._runs[request_id] = Run(claim, _detached(self._run(claim, backlog)))

        def forget(_: asyncio.Task[None]) -> None:
            if self._runs.get(request_id) is run:
                del self._runs[request_id]
            self._queue.wake()  # there is room again

        run.task.add_done_callback(forget)

    async def _run(self, claim: Claim, backlog: Backlog) -> None:
        """Run one claim to its end, whatever that is."""
        with logs.about(claim.job.request_id, claim.job.traceparent):
            await self._run_to_its_end(claim, backlog)

    async def _run_to_its_end(self, claim: Claim, backlog: Backlog) -> None:
        request_id = claim.job.request_id
        try:
            with _attempt(claim) as span:
                job = replace(claim.job, traceparent=span.traceparent)
                await self._follow_in_time(replace(claim, job=job), backlog, span)
        except asyncio.CancelledError:
            # its caller gave it up, its lease was lost, or we are closing; the queue knows which
            await self._release(claim, Setback.RETURNED)
        except NotReady as error:
            logger.warning("request %s waits: %s", request_id, error.message)
            await self._release(claim, Setback.UNSTARTED, IDLE_S)
        except WorkerLost as lost:
            logger.warning("request %s lost its worker: %s", request_id, lost.message)
            await self._release(claim, Setback.CRASHED)
        except Exception:
            logger.exception("request %s could not be run", request_id)
            await self._release(claim, Setback.CRASHED)

    async def _follow_in_time(self, claim: Claim, backlog: Backlog, span: traces.Span) -> None:
        """As `_follow`, if a worker begins in time, and for as long as requests of its model may run.

        Raises WorkerLost for one that has spoken and then is silent for the time of a lease.
        """
        patience_s = max(self._lease.lease_s, SILENCE_S)
        limit_s = self._limits.get(claim.job.model)
        left_s = None if claim.start_deadline is None else claim.start_deadline - self._queue.now()
        if left_s is not None and left_s <= 0:  # the claim took its time
            return await self._give_up(claim, StartTimeout(), span)
        running, silent = asyncio.timeout(None), asyncio.timeout(None)
        starting = asyncio.timeout(left_s)

        @contextlib.contextmanager
        def hear(update: Update) -> Iterator[None]:
            """While an update is written down nobody listens: what that takes is no fault of the worker's."""
            clock, due = asyncio.get_running_loop().time, running.when()
            heard_at = clock()
            silent.reschedule(None)
            running.reschedule(None)
            if update.has_begun:
                starting.reschedule(None)
            if update.result is not None:
                span.answered(update.result.status, update.result.error_type)
            yield
            silent.reschedule(clock() + patience_s)
            if update.has_begun and limit_s is not None:
                left_s = limit_s if due is None else due - heard_at
                running.reschedule(clock() + left_s)

        try:
            async with running, silent, starting:
                await self._follow(claim, backlog, hear)
        except TimeoutError:
            if silent.expired():
                raise WorkerLost(f"The worker was silent for {patience_s:g} s.") from None
            if starting.expired():
                await self._give_up(claim, StartTimeout(), span)
            elif running.expired():
                message = f"The request ran for longer than {limit_s:g} s, which this server allows."
                await self._give_up(claim, RunTimeout(message), span)
            else:
                raise

    async def _give_up(self, claim: Claim, late: DarkroomError, span: traces.Span) -> None:
        """End a request that is too late."""
        logger.warning("request %s: %s", claim.job.request_id, late.message)
        span.failed(late)
        if await insist(partial(self._queue.finish, claim, JobResult.failure(late))):
            await self._report(claim.job)

    async def _release(self, claim: Claim, setback: Setback, delay_s: float = 0) -> None:
        crash.point("dispatcher.releases")
        if await insist(partial(self._queue.release, claim, setback, delay_s)):
            await self._report(claim.job)
        crash.point("dispatcher.released")

    async def _follow(self, claim: Claim, backlog: Backlog, hear: Callable[[Update], Hearing]) -> None:
        """Write down what the worker says until it gives the result; each update is written within `hear`."""
        handle = self._connect(claim.job.model)
        job = replace(claim.job, waited_s=claim.waited_s)
        is_timed = claim.start_deadline is not None
        async with contextlib.aclosing(handle.generate(job, backlog)) as updates:
            async for update in updates:
                with hear(update):
                    crash.point("dispatcher.heard")
                    if is_timed and update.has_begun:
                        if not await insist(partial(self._queue.begin, claim)):
                            return  # someone else has it
                        is_timed = False
                    if not await insist(partial(self._write, claim, update)):
                        return  # someone else has it
                if update.result is not None:
                    crash.point("dispatcher.finished")
                    return
        raise WorkerLost("The worker ended without a result.")

    async def _write(self, claim: Claim, update: Update) -> bool:
        """Keep an update. False when the claim is lost."""
        if update.result is None:
            return not update.events or await self._queue.record(claim, update.events)
        is_kept = await self._queue.finish(claim, update.result, update.events)
        if is_kept:
            await self._report(claim.job)
        return is_kept

    async def _report(self, job: Job) -> None:
        """One log line for a request that has ended, as the queue knows it."""
        try:
            record = await self._queue.get(job.request_id, job.tenant)
        except StoreDown as error:
            logger.error("the end of request %s cannot be told: %s", job.request_id, logs.why(error))
        else:
            if record is not None:
                endings.tell(record)

    async def _renew(self) -> None:
        """Renew the leases now and then."""
        while True:
            await asyncio.sleep(self._lease.heartbeat_s)
            try:
                await self._beat()
            except Exception:
                logger.exception("the leases could not be renewed")

    async def _beat(self) -> None:
        """Renew the leases; stop what was lost."""
        before = list(self._runs.values())
        held = await self._queue.heartbeat([run.claim for run in before])
        for run in before:
            if run.claim.job.request_id not in held:
                run.task.cancel()

    @staticmethod
    async def _stop(run: Run) -> None:
        run.task.cancel()
        await asyncio.wait([run.task])


def _low_ones(jobs: Iterable[Job]) -> int:
    """How many are of low priority."""
    return sum(job.priority == Priority.LOW for job in jobs)


def _attempt(claim: Claim) -> AbstractContextManager[traces.Span]:
    """In the request's trace: one start of it, with its number; before the first, its wait in the queue."""
    numbers = {"darkroom.attempt": claim.attempt, "darkroom.fence": claim.fence}
    return traces.span(
        "dispatch",
        claim.job.traceparent,
        {**traces.of(claim.job), **numbers},
        "CONSUMER",
        waited_s=claim.waited_s if claim.attempt == 1 else 0.0,
    )


def _detached(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that outlives whoever starts it.

    In a clean context: Serve cancels calls made in the context of a request whose client left, and
    calls that share one parent request can hang a custom router.
    """
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())
