"""Holds one resident model and runs jobs on it. It knows neither the queue nor HTTP.

Threads overlap: large weights are loaded on some, texts and images are encoded on one, the engine
denoises on its own, pictures are decoded, checked and compressed on another. Pictures in requests
are decoded in processes of their own, which a stranger's file may end. This folder is the one bridge
between the asynchronous deployments and the synchronous pipelines.
"""

import asyncio
import contextvars
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from deployments import logs, metrics, traces
from deployments.affinity import Holding, Tier
from deployments.files.store import FileStore
from deployments.worker import loading
from deployments.worker.intake import Intake
from deployments.worker.progress import Progress
from deployments.worker.results import Results, inline
from deployments.worker.slots import Slots
from deployments.worker.stopwatch import Stopwatch, measure, speed
from deployments.worker.updates import Updates
from pipelines import registry
from pipelines.base import AnyPipeline, Assets, Generation, Outcome
from pipelines.decoding import Decoding
from pipelines.engine.device import is_lost
from pipelines.engine.engine import Engine
from pipelines.engine.memory import with_room
from pipelines.exit import Exit, Finished
from schemas.errors import (
    DarkroomError,
    InternalError,
    NotFinite,
    NotFound,
    OutOfMemory,
    ServerError,
)
from schemas.fields import EndpointInput
from schemas.jobs import WORD_S, Job, JobEvent, JobResult, Logged, Previewed, Update
from schemas.settings import ModelSettings

logger = logging.getLogger(__name__)

UPDATE_S = 0.05  # events of so long travel together
PREVIEW_S = 0.5  # the shortest time between two previews of a job
DEVICE_LOST = 3  # the exit code
RANDOM_SEEDS = 2**32  # JSON numbers are exact to 2^53

T = TypeVar("T")


class Worker:
    """One replica: a model, its endpoints' pipelines, an engine."""

    def __init__(self, settings: ModelSettings, files: FileStore, name: str = "") -> None:
        """`name`: the model's application, for the metrics."""
        torch.set_num_threads(settings.cpu_threads or os.cpu_count() or 1)
        loading.bound_gpu_memory(settings)
        loading.check_room(settings)
        self._settings = settings
        self._name = name
        self._slots = Slots(settings.concurrency)
        self._pipelines, model = loading.load(settings)
        self._manner = f"in {model.precision or settings.dtype}, by {model.attention} attention"
        self._narrowed = {"float8_layers": float(model.float8_layers)} if model.float8_layers else {}
        self.intake = Intake(settings, files, model)
        self._exit = Exit(loading.load_safety_checker(settings), settings.safety)
        self._decodings = Decoding()
        self._results = Results(files)
        # as many as there are jobs: one that waits for room there must not stop another
        self._loading = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="load")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="decode")
        pace = loading.measured_pace(settings, self._pipelines, model)
        self._engine = Engine(model.predict, settings.batch_tokens, pace)
        self._engine.start()
        if settings.device.startswith("cuda"):
            logger.info("at most %.2f GiB were in use so far", torch.cuda.max_memory_allocated() / 2**30)

    def check_health(self) -> None:
        """Raise when the replica must be replaced."""
        if not self._engine.is_alive:
            raise InternalError("The engine's thread has ended.")

    def close(self) -> None:
        self._engine.close()
        self.intake.close()
        self._loading.shutdown(wait=False, cancel_futures=True)  # a job may wait for room in vain by now
        self._encoding.shutdown(cancel_futures=True)
        self._decoding.shutdown(cancel_futures=True)

    def measure(self, holdings: Iterable[Holding]) -> None:
        """Tell the metrics what is held: `holdings`, asked for just now, and the device's memory."""
        held = dict.fromkeys(Tier, 0)
        for holding in holdings:
            held[holding.tier] += holding.nbytes
        for tier, nbytes in held.items():
            metrics.HELD.set(nbytes, model=self._name, tier=tier)
        if self._settings.device.startswith("cuda"):
            for kind, nbytes in loading.gpu_memory(self._settings).items():
                metrics.GPU_MEMORY.set(nbytes, model=self._name, kind=kind)

    async def run(self, endpoint_id: str, request: EndpointInput) -> BaseModel:
        """A direct call, past the queue: the endpoint's typed Input in, its typed Output out.

        Raises RequestFailed. Pictures are in the file store, or inline in sync mode.
        """
        job = Job(
            request_id=f"direct-{secrets.token_hex(8)}",
            endpoint_id=endpoint_id,
            model=self._name,
            input=request.model_dump(mode="json"),
        )
        result = JobResult.failure(InternalError("The run ended without a result."))
        async for update in self.generate(job):
            result = update.result or result
        fields = result.output()
        output: BaseModel = registry.endpoint(endpoint_id).schema().Output(**fields)
        return output

    async def generate(self, job: Job) -> AsyncGenerator[Update]:
        """Run a job; the last update has its result. Closing the generator frees the engine.

        Of more than `concurrency` jobs the later ones wait here, and their weights are fetched meanwhile.
        """
        if self._slots.locked():
            self.prefetch(job)
        updates = Updates()
        task = asyncio.create_task(self._perform(job, updates))
        task.add_done_callback(updates.end)
        try:
            while not updates.ended.is_set():
                await _wait(updates.filled, WORD_S)
                await _wait(updates.ended, UPDATE_S)
                if not updates.ended.is_set():
                    yield Update(updates.take(), has_begun=updates.has_begun)
            yield Update(updates.take(), task.result())
        finally:
            task.cancel()

    def prefetch(self, job: Job) -> None:
        """Begin to fetch the weights that a job names, before it comes. Returns at once."""
        with suppress(DarkroomError, ValidationError):  # what is wrong with it, it is told when it runs
            _, request = self._read(job)
            self.intake.prefetch(job, request)

    async def _perform(self, job: Job, updates: Updates) -> JobResult:
        with logs.about(job.request_id, job.traceparent), _span(job) as span:
            result = await self._result(job, updates, span)
            span.answered(result.status, result.error_type)
        return result

    async def _result(self, job: Job, updates: Updates, span: traces.Span) -> JobResult:
        came = time.monotonic()
        try:
            async with self._slots.held(job.priority):
                waited_s = time.monotonic() - came
                span.child("wait", waited_s)
                updates.has_begun = True
                if job.start_timeout_s is not None:
                    updates.filled.set()  # somebody waits to hear that
                return await self._answer(job, job.waited_s + waited_s, updates.add, span)
        except ServerError as error:
            logger.warning("request %s failed: %s", job.request_id, logs.why(error))
            return JobResult.failure(error)
        except DarkroomError as error:
            return JobResult.failure(error)
        except Exception:
            logger.exception("request %s failed", job.request_id)
            if is_lost(self._settings.device):
                logger.critical("the device of this replica computes no more: the replica ends")
                os._exit(DEVICE_LOST)  # the queue gives its requests to others
            message = f"The model failed. The server's log says why, under {job.request_id}."
            return JobResult.failure(InternalError(message))

    async def _answer(
        self, job: Job, queue_s: float, emit: Callable[[JobEvent], None], span: traces.Span
    ) -> JobResult:
        pipeline, request = self._read(job)
        for tier in self.intake.tiers(request):
            metrics.LOOKUPS.add(model=self._name, tier=tier or "none")
        watch = Stopwatch(span)
        async with AsyncExitStack() as stack:
            fetched = await self.intake.fetch(job, request, stack, emit)
            watch.lap("fetch")
            stack.enter_context(await self._hold(pipeline, request, fetched))
            watch.lap("adapters")
            generation = await self._prepare(pipeline, request, fetched)
            with generation.resources:
                for note in generation.notes:
                    emit(Logged(note, "WARN"))
                watch.lap("encode")
                emit(Logged(self._manner))
                steps = await self._denoise(job, pipeline, request, generation, emit)
                watch.lap("denoise", steps)
            # what is held stays: the decoder may be part of it
            finished = await self._finish(pipeline, generation)
            watch.lap("decode")
        pictures = await self._results.pictures(job, generation, finished)
        traces = await self._results.traces(job, finished)
        watch.lap("upload")
        if generation.check_safety and not self._exit.checks(generation):
            emit(Logged("no safety checker is configured: the pictures were not checked", "WARN"))
        timings = {"queue": round(queue_s, 4)} | watch.timings() | speed(generation, watch)
        timings |= self._narrowed
        measure(self._name, timings)
        logger.debug("request %s %s: %s", job.request_id, self._manner, timings)
        outcome = Outcome(pictures, generation.seed, finished.flags, timings, traces)
        output = pipeline.answer(request, outcome)
        return JobResult.success(output.model_dump(mode="json"), timings["inference"])

    def _read(self, job: Job) -> tuple[AnyPipeline, EndpointInput]:
        """The pipeline that runs a job, and its typed input. Raises NotFound, InputError, ValidationError."""
        pipeline = self._pipelines.get(job.endpoint_id)
        if pipeline is None:
            raise NotFound(f"This worker does not serve {job.endpoint_id}.")
        request = registry.endpoint(job.endpoint_id).input_type().model_validate(job.input)
        request.check(self._settings.limits)
        return pipeline, request

    async def _hold(self, pipeline: AnyPipeline, request: EndpointInput, fetched: Assets) -> ExitStack:
        """Off the loop, beside others. What a cancelled request would have held is given back."""
        holding = self._loading.submit(_in_context(with_room), pipeline.hold, request, fetched)
        try:
            return await asyncio.wrap_future(holding)
        except asyncio.CancelledError:
            holding.add_done_callback(_let_go)
            raise

    async def _prepare(self, pipeline: AnyPipeline, request: EndpointInput, fetched: Assets) -> Generation:
        """Off the loop. What a cancelled request would have held is given back when it is ready."""
        seed = secrets.randbelow(RANDOM_SEEDS)
        preparing = self._encoding.submit(_in_context(with_room), pipeline.prepare, request, fetched, seed)
        try:
            return await asyncio.wrap_future(preparing)
        except asyncio.CancelledError:
            preparing.add_done_callback(_give_back)
            raise

    async def _denoise(
        self,
        job: Job,
        pipeline: AnyPipeline,
        request: EndpointInput,
        generation: Generation,
        emit: Callable[[JobEvent], None],
    ) -> list[traces.Moment]:
        """Put the samples through the engine, telling of each step. Returns when each was done."""
        ahead = [sample for sample in generation.samples if not sample.is_done]
        progress = Progress(ahead, asyncio.get_running_loop())
        for sample in ahead:
            self._engine.add(sample, progress, job.priority)
        previewed_at = 0.0
        steps: list[traces.Moment] = []
        try:
            async for step in progress.steps():
                line = f"step {step}/{progress.total}"
                emit(Logged(line))
                steps.append((line, time.time()))
                now = time.monotonic()
                wants_preview = job.previews and self._exit.has_previews and step < progress.total
                if wants_preview and now - previewed_at >= PREVIEW_S:
                    previewed_at = now
                    if preview := await self._preview(pipeline, request, generation):
                        emit(preview)
        finally:
            for sample in ahead:
                self._engine.remove(sample)
        return steps

    async def _preview(
        self, pipeline: AnyPipeline, request: EndpointInput, generation: Generation
    ) -> Previewed | None:
        """None where none can be made; that says nothing of the picture."""
        try:
            shown: Finished = await self._off_loop(
                self._decoding, with_room, self._exit.preview, pipeline, generation
            )
        except (NotFinite, OutOfMemory) as error:
            logger.info("no preview: %s", error.message)
            return None
        pictures = tuple(inline(each) for each in shown.pictures)
        output = pipeline.answer(request, Outcome(pictures, generation.seed, shown.flags, {}))
        return Previewed(output.model_dump(mode="json"))

    async def _finish(self, pipeline: AnyPipeline, generation: Generation) -> Finished:
        """Off the loop, with whatever else waits for the decoder by then."""
        waiting = self._decodings.add(pipeline, generation)

        def finish() -> Finished:
            pixels = self._decodings.pixels(waiting)
            return with_room(self._exit.finished, pipeline, generation, pixels)

        try:
            finished: Finished = await self._off_loop(self._decoding, finish)
            return finished
        finally:
            self._decodings.drop(waiting)

    @staticmethod
    async def _off_loop(pool: ThreadPoolExecutor, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, _in_context(call), *args)


def _let_go(holding: "Future[ExitStack]") -> None:
    """Close what nobody will use."""
    if not holding.cancelled() and holding.exception() is None:
        holding.result().close()


def _give_back(preparing: "Future[Generation]") -> None:
    """Close what a generation holds that nobody will run."""
    if not preparing.cancelled() and preparing.exception() is None:
        preparing.result().resources.close()


def _span(job: Job) -> AbstractContextManager[traces.Span]:
    """A worker's part of the request's trace, in OpenTelemetry's words for generative AI."""
    kind = {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.output.type": "image",
        "gen_ai.provider.name": "darkroom",
    }
    return traces.span(f"generate_content {job.endpoint_id}", job.traceparent, traces.of(job) | kind)


def _in_context(call: Callable[..., T]) -> Callable[..., T]:
    """The call on another thread, whose log lines are about this task's request as well."""
    return partial(contextvars.copy_context().run, call)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
