"""Holds one resident model and runs jobs on it. It knows neither the queue nor HTTP.

Threads overlap: large weights are loaded on some, texts and images are encoded on one, the engine
denoises on its own, pictures are decoded, checked and compressed on another. Pictures in requests
are decoded in processes of their own, which a stranger's file may end. This file is the one bridge
between the asynchronous deployments and the synchronous pipelines.
"""

import asyncio
import base64
import contextvars
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL.Image import Image as Picture
from pydantic import BaseModel, ValidationError

from deployments import logs, metrics, traces
from deployments.affinity import Holding, Tier
from deployments.files.fetch import Fetcher
from deployments.files.store import FileStore
from deployments.files.weights import Weights
from deployments.holdings import Holdings
from deployments.pictures.decoders import Decoders
from deployments.progress import Progress
from deployments.slots import Slots
from pipelines import images, pacing, registry, sources
from pipelines.base import AnyPipeline, Assets, Generation, Model, Outcome
from pipelines.decoding import Decoding
from pipelines.engine.engine import Engine
from pipelines.engine.memory import with_room
from pipelines.engine.pace import Pace
from pipelines.exit import Encoded, Exit, Finished
from pipelines.placement import placed
from pipelines.safety import SafetyChecker
from schemas.assets import Asset, AssetKind, assets, weights
from schemas.errors import (
    AssetError,
    DarkroomError,
    FieldError,
    InputError,
    InternalError,
    Location,
    NotFinite,
    NotFound,
    OutOfMemory,
    ServerError,
)
from schemas.fields import EndpointInput, File, PictureFile
from schemas.jobs import WORD_S, Job, JobEvent, JobResult, Logged, Previewed, Update
from schemas.settings import ModelSettings

logger = logging.getLogger(__name__)

UPDATE_S = 0.05  # events of so long travel together
PREVIEW_S = 0.5  # the shortest time between two previews of a job
NO_STAGES = frozenset(("queue", "inference", "steps_skipped", "float8_layers"))  # of timings
RANDOM_SEEDS = 2**32  # JSON numbers are exact to 2^53
PREFETCHES = 2  # files fetched ahead at once

T = TypeVar("T")
_Fetched = Picture | Path | bytes | AssetError


class Worker:
    """One replica: a model, its endpoints' pipelines, an engine."""

    def __init__(self, settings: ModelSettings, files: FileStore, name: str = "") -> None:
        """`name`: the model's application, for the metrics."""
        torch.set_num_threads(settings.cpu_threads or os.cpu_count() or 1)
        _bound_gpu_memory(settings)
        _check_room(settings)
        self._settings = settings
        self._name = name
        self._files = files
        self._fetcher = Fetcher(files, settings.fetch)
        self._weights = Weights(self._fetcher, settings, sources.locate)
        self._slots = Slots(settings.concurrency)
        self._prefetching = asyncio.Semaphore(PREFETCHES)
        self._prefetches: set[asyncio.Task[None]] = set()
        self._pipelines, model = _load(settings)
        self._manner = f"in {model.precision or settings.dtype}, by {model.attention} attention"
        self._narrowed = {"float8_layers": float(model.float8_layers)} if model.float8_layers else {}
        self._holdings = Holdings(model)
        self._exit = Exit(_load_safety_checker(settings), settings.safety)
        self._decodings = Decoding()
        self._decoders = Decoders(settings.picture_decoders)
        # as many as there are jobs: one that waits for room there must not stop another
        self._loading = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="load")
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._engine = Engine(model.predict, settings.batch_tokens, _pace(settings, self._pipelines, model))
        self._engine.start()
        if settings.device.startswith("cuda"):
            logger.info("at most %.2f GiB were in use so far", torch.cuda.max_memory_allocated() / 2**30)

    def check_health(self) -> None:
        """Raise when the replica must be replaced."""
        if not self._engine.is_alive:
            raise InternalError("The engine's thread has ended.")

    def close(self) -> None:
        self._engine.close()
        self._decoders.close()
        self._loading.shutdown(wait=False, cancel_futures=True)  # a job may wait for room in vain by now
        self._encoding.shutdown(cancel_futures=True)
        self._decoding.shutdown(cancel_futures=True)

    def holdings(self) -> dict[str, Holding]:
        """The weights that requests have named, by their assets' digests, and where they are here."""
        return self._holdings.told()

    def measure(self, holdings: Iterable[Holding]) -> None:
        """Tell the metrics what is held: `holdings`, asked for just now, and the device's memory."""
        held = dict.fromkeys(Tier, 0)
        for holding in holdings:
            held[holding.tier] += holding.nbytes
        for tier, nbytes in held.items():
            metrics.HELD.set(nbytes, model=self._name, tier=tier)
        if self._settings.device.startswith("cuda"):
            for kind, nbytes in _gpu_memory(self._settings).items():
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
        outbox = _Outbox()
        task = asyncio.create_task(self._perform(job, outbox))
        task.add_done_callback(outbox.end)
        try:
            while not outbox.ended.is_set():
                await _wait(outbox.filled, WORD_S)
                await _wait(outbox.ended, UPDATE_S)
                if not outbox.ended.is_set():
                    yield Update(outbox.take(), has_begun=outbox.has_begun)
            yield Update(outbox.take(), task.result())
        finally:
            task.cancel()

    def prefetch(self, job: Job) -> None:
        """Begin to fetch the weights that a job names, so that they are on disk when it comes.

        Returns at once. It is only a cache: what goes wrong here, the job meets and tells when it runs.
        """
        # in a clean context: it outlives the call that began it
        task = asyncio.get_running_loop().create_task(self._prefetch(job), context=contextvars.Context())
        self._prefetches.add(task)
        task.add_done_callback(self._prefetches.discard)

    async def _prefetch(self, job: Job) -> None:
        try:
            _, request = self._read(job)
        except (DarkroomError, ValidationError):
            return
        await asyncio.gather(*(self._keep(asset, job) for asset in weights(request)))

    async def _keep(self, asset: Asset, job: Job) -> None:
        """Have a file in the cache on disk, unpinned."""
        async with self._prefetching:
            try:
                lease = await self._weights.locate(asset, job.base_url, lambda line: None)
            except (AssetError, OSError) as error:
                logger.info("a file of request %s was not fetched ahead: %s", job.request_id, error)
            else:
                self._holdings.note(asset, lease.path)
                lease.release()

    async def _perform(self, job: Job, outbox: "_Outbox") -> JobResult:
        with logs.about(job.request_id, job.traceparent), _span(job) as span:
            result = await self._result(job, outbox, span)
            span.answered(result.status, result.error_type)
        return result

    async def _result(self, job: Job, outbox: "_Outbox", span: traces.Span) -> JobResult:
        came = time.monotonic()
        try:
            async with self._slots.held(job.priority):
                waited_s = time.monotonic() - came
                span.child("wait", waited_s)
                outbox.has_begun = True
                if job.start_timeout_s is not None:
                    outbox.filled.set()  # somebody waits to hear that
                return await self._answer(job, job.waited_s + waited_s, outbox.add, span)
        except ServerError as error:
            logger.warning("request %s failed: %s", job.request_id, logs.why(error))
            return JobResult.failure(error)
        except DarkroomError as error:
            return JobResult.failure(error)
        except Exception:
            logger.exception("request %s failed", job.request_id)
            message = f"The model failed. The server's log says why, under {job.request_id}."
            return JobResult.failure(InternalError(message))

    async def _answer(
        self, job: Job, queue_s: float, emit: Callable[[JobEvent], None], span: traces.Span
    ) -> JobResult:
        pipeline, request = self._read(job)
        self._count_lookups(request)
        watch = _Stopwatch(span)
        async with AsyncExitStack() as stack:
            fetched = await self._fetch(job, request, stack, emit)
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
        pictures = [await self._store(job, generation, each) for each in finished.pictures]
        traces = {field: await self._store_trace(job, field, tar) for field, tar in finished.traces.items()}
        watch.lap("upload")
        if generation.check_safety and not self._exit.checks(generation):
            emit(Logged("no safety checker is configured: the pictures were not checked", "WARN"))
        timings = {"queue": round(queue_s, 4)} | watch.timings() | _speed(generation, watch)
        timings |= self._narrowed
        _measure(self._name, timings)
        logger.debug("request %s %s: %s", job.request_id, self._manner, timings)
        outcome = Outcome(tuple(pictures), generation.seed, finished.flags, timings, traces)
        output = pipeline.answer(request, outcome)
        return JobResult.success(output.model_dump(mode="json"), timings["inference"])

    def _count_lookups(self, request: EndpointInput) -> None:
        for asset in dict.fromkeys(weights(request)):
            metrics.LOOKUPS.add(model=self._name, tier=self._holdings.tier(asset) or "none")

    def _read(self, job: Job) -> tuple[AnyPipeline, EndpointInput]:
        """The pipeline that runs a job, and its typed input. Raises NotFound, InputError, ValidationError."""
        pipeline = self._pipelines.get(job.endpoint_id)
        if pipeline is None:
            raise NotFound(f"This worker does not serve {job.endpoint_id}.")
        request = registry.endpoint(job.endpoint_id).input_type().model_validate(job.input)
        request.check(self._settings.limits)
        return pipeline, request

    async def _fetch(
        self, job: Job, request: EndpointInput, stack: AsyncExitStack, emit: Callable[[JobEvent], None]
    ) -> Assets:
        """Get every file that the request names, all at once; `stack` keeps them from eviction.

        Raises InputError that names each field whose file cannot be had.
        """

        async def fetch(asset: Asset) -> _Fetched:
            try:
                if asset.kind is AssetKind.IMAGE:
                    data = await self._fetcher.image(asset.source, job.base_url)
                    return await self._decoders.decode(data)
                if asset.kind is AssetKind.CONFIG:
                    return await self._fetcher.config(asset.source, job.base_url)
                lease = await self._weights.locate(asset, job.base_url, lambda line: emit(Logged(line)))
                path = stack.enter_context(lease)
                self._holdings.note(asset, path)
                return path
            except AssetError as error:
                return error

        refs = list(assets(request))
        wanted = dict.fromkeys(ref.asset for ref in refs)
        try:
            async with asyncio.TaskGroup() as group:
                found = {asset: group.create_task(fetch(asset)) for asset in wanted}
        except ExceptionGroup as failed:  # such as a full disk; the first has ended the others
            raise failed.exceptions[0] from None
        return _by_field((ref.loc, found[ref.asset].result()) for ref in refs)

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
        pictures = tuple(_inline(each) for each in shown.pictures)
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

    async def _store(self, job: Job, generation: Generation, encoded: Encoded) -> PictureFile:
        if generation.inline:
            return _inline(encoded)
        picture, data, kind = encoded.picture, encoded.data, images.content_type(encoded.format)
        key = await self._files.save(data, kind, job.keep_s)
        return PictureFile(
            url=self._files.url(key, job.base_url),
            content_type=kind,
            file_name=key,
            file_size=len(data),
            width=picture.width,
            height=picture.height,
        )

    async def _store_trace(self, job: Job, field: str, tar: bytes) -> File:
        kind = "application/x-tar"
        url = self._files.url(await self._files.save(tar, kind, job.keep_s), job.base_url)
        return File(url=url, content_type=kind, file_name=f"{field}.tar", file_size=len(tar))

    @staticmethod
    async def _off_loop(pool: ThreadPoolExecutor, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, _in_context(call), *args)


def _by_field(named: Iterable[tuple[Location, _Fetched]]) -> Assets:
    """Every file under the fields that name it. Raises InputError that names each without one."""
    pictures: dict[Location, Picture] = {}
    weights: dict[Location, Path] = {}
    configs: dict[Location, bytes] = {}
    faults: list[FieldError] = []
    for loc, found in named:
        match found:
            case Picture():
                pictures[loc] = found
            case Path():
                weights[loc] = found
            case bytes():
                configs[loc] = found
            case AssetError():
                faults += found.at(loc).fields
    if faults:
        raise InputError(faults)
    return Assets(pictures, weights, configs)


def _let_go(holding: "Future[ExitStack]") -> None:
    """Close what nobody will use."""
    if not holding.cancelled() and holding.exception() is None:
        holding.result().close()


def _give_back(preparing: "Future[Generation]") -> None:
    """Close what a generation holds that nobody will run."""
    if not preparing.cancelled() and preparing.exception() is None:
        preparing.result().resources.close()


class _Outbox:
    """Events on their way out of a job, until it ends."""

    def __init__(self) -> None:
        self.filled = asyncio.Event()  # something to take, or the end
        self.ended = asyncio.Event()
        self.has_begun = False
        self._events: list[JobEvent] = []

    def add(self, event: JobEvent) -> None:
        self._events.append(event)
        self.filled.set()

    def end(self, _: "asyncio.Task[JobResult]") -> None:
        self.ended.set()
        self.filled.set()

    def take(self) -> tuple[JobEvent, ...]:
        events, self._events = tuple(self._events), []
        if not self.ended.is_set():
            self.filled.clear()
        return events


def _span(job: Job) -> AbstractContextManager[traces.Span]:
    """A worker's part of the request's trace, in OpenTelemetry's words for generative AI."""
    kind = {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.output.type": "image",
        "gen_ai.provider.name": "darkroom",
    }
    return traces.span(f"generate_content {job.endpoint_id}", job.traceparent, traces.of(job) | kind)


class _Stopwatch:
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


def _speed(generation: Generation, watch: _Stopwatch) -> dict[str, float]:
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


def _measure(model: str, timings: Mapping[str, float]) -> None:
    """Tell the metrics of a request that went well."""
    for name, value in timings.items():
        if name == "steps_per_second":
            metrics.PACE.observe(value, model=model)
        elif name == "rows":
            metrics.COMPANY.observe(value, model=model)
        elif name not in NO_STAGES:
            metrics.STAGE.observe(value, model=model, stage=name)


def _inline(encoded: Encoded) -> PictureFile:
    picture, data, kind = encoded.picture, encoded.data, images.content_type(encoded.format)
    return PictureFile(
        url=f"data:{kind};base64,{base64.b64encode(data).decode()}",
        content_type=kind,
        file_name=f"image.{encoded.format}",
        file_size=len(data),
        width=picture.width,
        height=picture.height,
    )


def _in_context(call: Callable[..., T]) -> Callable[..., T]:
    """The call on another thread, whose log lines are about this task's request as well."""
    return partial(contextvars.copy_context().run, call)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


def _bound_gpu_memory(settings: ModelSettings) -> None:
    """Ray's fraction is only bookkeeping; this makes torch keep to it."""
    if settings.device.startswith("cuda") and 0 < settings.num_gpus < 1:
        torch.cuda.set_per_process_memory_fraction(settings.num_gpus)


def _gpu_memory(settings: ModelSettings) -> dict[str, int]:
    """In bytes; `limit` is what the replica may have."""
    _, total = torch.cuda.mem_get_info(settings.device)
    return {
        "allocated": torch.cuda.memory_allocated(settings.device),
        "reserved": torch.cuda.memory_reserved(settings.device),
        "limit": int(total * min(settings.num_gpus or 1.0, 1.0)),
    }


def _check_room(settings: ModelSettings) -> None:
    """Log what the model will take. Raises NoRoom where that is more than it has."""
    card = None
    if settings.device.startswith("cuda"):
        card = torch.cuda.get_device_properties(settings.device).total_memory
    placement = placed(settings, sources.locate, card)
    logger.info("%s", "\n".join(placement.lines()))
    placement.check()


def _load(settings: ModelSettings) -> tuple[Mapping[str, AnyPipeline], Model]:
    """The resident model, and a pipeline on it for each endpoint."""
    endpoints = [registry.endpoint(endpoint_id) for endpoint_id in settings.endpoints]
    kinds: dict[str, type[AnyPipeline]] = {each.id: each.pipeline().Pipeline for each in endpoints}
    families = {each.family for each in endpoints}
    if len(families) != 1:
        raise ValueError(f"one model cannot serve several families: {sorted(families)}")
    started = time.monotonic()
    model = next(iter(kinds.values())).model_type.load(settings, sources.locate)
    logger.info("loaded %s in %.1f s", settings.model, time.monotonic() - started)
    model.warm()
    return {endpoint_id: kind(model) for endpoint_id, kind in kinds.items()}, model


def _pace(settings: ModelSettings, pipelines: Mapping[str, AnyPipeline], model: Model) -> Pace:
    """How many rows gain: as the settings say, or as this device shows."""
    if settings.batch_rows is not None or settings.device == "cpu":
        return Pace(rows=settings.batch_rows)
    endpoint_id, pipeline = next(iter(pipelines.items()))
    started = time.monotonic()
    with pacing.probes(pipeline, registry.endpoint(endpoint_id).schema(), settings) as samples:
        pace = pacing.measured(model.predict, samples, settings.batch_tokens)
    for curve in pace.curves:
        took = ", ".join(f"{rows}: {seconds * 1000:.1f} ms" for rows, seconds in curve.seconds.items())
        logger.info("rows of %d image tokens: %s; %d gain", curve.cost, took, curve.rows)
    logger.info("measured the pace of %s in %.1f s", settings.model, time.monotonic() - started)
    return pace


def _load_safety_checker(settings: ModelSettings) -> SafetyChecker | None:
    if settings.safety_checker is None:
        return None
    return SafetyChecker.load(sources.locate(settings.safety_checker), settings.device)
