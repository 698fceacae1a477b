"""Binds the rooms to Ray Serve: the only file that knows them all.

Two builders, named in serve_config.yaml. `front` makes the application that clients talk to, `model`
makes one application per resident model. They are separate, because in one application a change of
any `args` would restart every model.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application
from ray.serve import metrics as serve_metrics
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments import logs, metrics, traces
from deployments.dispatcher import Dispatcher, ModelHandle
from deployments.files.egress import Egress, resolve
from deployments.files.store import open_files
from deployments.files.sweeper import Sweeper
from deployments.gateway import http, keys
from deployments.gateway.gateway import Gateway
from deployments.gateway.throttle import Throttle
from deployments.meter import Meter
from deployments.queue import open_keys, open_outbox, open_queue
from deployments.readiness import Readiness
from deployments.router import STATS_S
from deployments.webhooks.keyring import open_keyring
from deployments.webhooks.sender import Sender
from pipelines import registry
from schemas.assets import takes_weights, weights
from schemas.errors import NotReady, WorkerLost
from schemas.fields import EndpointInput
from schemas.jobs import Backlog, Job, Update
from schemas.settings import Catalogue, FrontSettings, ModelSettings

logger = logging.getLogger("ray.serve")

FRONT = "darkroom"  # the front application's name
WORKER = "worker"  # the deployment's name in every model's application
FRONT_CPUS = 0.1  # what Ray books for a gateway or a dispatcher
WATCHERS = 10_000  # requests that a gateway replica takes at once; those that only wait are cheap
HEALTH_CHECK_S = 5
SPARE_CALLS = 4  # that a replica takes beside its `concurrency`: a prefetch waits for no picture


def front(settings: FrontSettings) -> Application:
    """The gateway, which owns the HTTP port, and the dispatcher, in whose process the webhooks' sender and
    the files' sweeper are.

    Both get the catalogue of models as `user_config`, so that a new model restarts neither.
    """
    actor_options = _actor_options(settings.node_labels, num_cpus=FRONT_CPUS)
    dispatcher = serve.deployment(
        _DispatcherReplica,
        name="dispatcher",
        num_replicas=1,
        ray_actor_options=actor_options,
        health_check_period_s=HEALTH_CHECK_S,
    )
    gateway = serve.deployment(
        serve.ingress()(_GatewayReplica),
        name="gateway",
        num_replicas=settings.gateway_replicas,
        ray_actor_options=actor_options,
        max_ongoing_requests=WATCHERS,
        health_check_period_s=HEALTH_CHECK_S,
    )
    return gateway.bind(settings, dispatcher.bind(settings))


def model(settings: ModelSettings) -> Application:
    """One resident model and the endpoints it serves.

    The workers stand behind an entry, because Serve lets no application's first deployment have a router of
    its own. Only Python callers pass through it; the dispatcher calls the workers.
    """
    worker = serve.deployment(
        _WorkerReplica,
        name=WORKER,
        ray_actor_options=_actor_options(
            settings.node_labels, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus
        ),
        autoscaling_config=_autoscaling(settings),
        max_ongoing_requests=settings.concurrency + SPARE_CALLS,
        graceful_shutdown_timeout_s=settings.drain_s,
        health_check_period_s=HEALTH_CHECK_S,
        max_constructor_retry_count=3,
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.router.AffinityRouter",
            request_routing_stats_period_s=STATS_S,
        ),
    )
    entry = serve.deployment(
        _EntryReplica,
        name="entry",
        num_replicas=1,
        ray_actor_options=_actor_options(settings.entry_node_labels, num_cpus=0),
        max_ongoing_requests=WATCHERS,
        health_check_period_s=HEALTH_CHECK_S,
    )
    return entry.bind(worker.bind(settings))


def _autoscaling(settings: ModelSettings) -> AutoscalingConfig:
    """Our policy holds replicas by itself, so that Serve adds no delays of its own."""
    wishes = settings.autoscaling
    common = {
        "min_replicas": settings.min_replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": settings.concurrency,
        "metrics_interval_s": 1,
    }
    if wishes.policy == "requests":
        return AutoscalingConfig(
            **common,
            look_back_period_s=5,
            upscale_delay_s=2,
            downscale_delay_s=wishes.hold_s,
            downscale_to_zero_delay_s=wishes.idle_s,
        )
    policy = AutoscalingPolicy(
        policy_function="deployments.autoscaling:WorkPolicy",
        policy_kwargs=wishes.model_dump(exclude={"policy"}),
    )
    return AutoscalingConfig(
        **common, look_back_period_s=2, upscale_delay_s=0, downscale_delay_s=0, policy=policy
    )


def _actor_options(node_labels: Mapping[str, str], **resources: float) -> dict[str, Any]:
    """What Ray books for a replica, and where; without labels it says nothing of where."""
    return {**resources, **({"label_selector": dict(node_labels)} if node_labels else {})}


class _GatewayReplica:
    def __init__(self, settings: FrontSettings, dispatcher: DeploymentHandle) -> None:
        _join_logs()
        metrics.send_to(_RayMetrics())
        traces.start("gateway")
        self._settings = settings
        # here and not in `front`, which runs on any node: the secret is for the gateway's alone
        self._digests = keys.parse(os.environ.get(settings.keys_env, ""))
        self._gateway: Gateway | None = None
        self._catalogue = Catalogue(models={})
        self._readiness = Readiness(lambda: serve.status().applications)

    async def __serve_build_asgi_app__(self) -> Any:
        webhooks = self._settings.webhooks
        keyring = open_keyring(webhooks.keys, webhooks.key_overlap_s)
        table = open_keys(self._settings.queue_url)
        throttle = Throttle(self._settings.bad_keys_per_minute)
        secret = await asyncio.to_thread(self._opened().files.place.secret)
        known = keys.Keys(self._digests, table=table, throttle=throttle, secret=secret)
        await known.refresh()
        if not known.are_required:
            logger.warning(
                "AUTHENTICATION IS OFF: whoever reaches this server may use it. `darkroom keys create` turns "
                "it on, as does %s.",
                self._settings.keys_env,
            )
        return http.build(self._opened(), known, self._ready, keyring.jwks)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self._catalogue = Catalogue.model_validate(user_config)
        self._opened().configure(self._catalogue)

    async def run(self, endpoint_id: str, request: EndpointInput | dict[str, Any]) -> Any:
        """See Gateway.run."""
        return await self._opened().run(endpoint_id, request)

    async def check_health(self) -> None:
        if self._gateway is not None and not self._gateway.is_alive:
            raise RuntimeError("The queue can no longer be written.")

    def __del__(self) -> None:
        traces.close()

    def _opened(self) -> Gateway:
        if self._gateway is None:
            queue = open_queue(self._settings.queue_url, self._settings.lease, self._settings.keep)
            files = open_files(self._settings.files_url)
            self._gateway = Gateway(queue, files, self._settings)
        return self._gateway

    async def _ready(self) -> bool:
        """Whether the front and every model could take a request."""
        return await self._readiness.of({FRONT, *self._catalogue.models})


class _DispatcherReplica:
    def __init__(self, settings: FrontSettings) -> None:
        _join_logs()
        metrics.send_to(_RayMetrics())
        traces.start("dispatcher")
        self._settings = settings
        self._dispatcher: Dispatcher | None = None
        self._sender: Sender | None = None
        self._sweeper: Sweeper | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        if self._dispatcher is None:
            queue = open_queue(self._settings.queue_url, self._settings.lease, self._settings.keep)
            self._dispatcher = Dispatcher(queue, self._settings.lease, _ServeModels().connect, _input_type)
            self._sender = _open_sender(self._settings)
            self._sender.start()
            self._sweeper = Sweeper(open_files(self._settings.files_url), self._settings.sweep_s)
            self._sweeper.start()
        await self._dispatcher.configure(Catalogue.model_validate(user_config))

    async def check_health(self) -> None:
        if self._dispatcher is not None and not self._dispatcher.is_alive:
            raise RuntimeError("The dispatcher's loops have ended.")
        if self._sender is not None and not self._sender.is_alive:
            raise RuntimeError("The sender of webhooks has ended.")
        if self._sweeper is not None:
            if not self._sweeper.is_alive:
                raise RuntimeError("The sweeper of files has ended.")
            self._sweeper.measure()

    async def __del__(self) -> None:
        if self._sweeper is not None:
            await self._sweeper.close()
        if self._sender is not None:
            await self._sender.close()
        if self._dispatcher is not None:
            await self._dispatcher.close()
        traces.close()


class _EntryReplica:
    def __init__(self, worker: DeploymentHandle) -> None:
        self._worker = worker

    async def run(self, endpoint_id: str, request: EndpointInput) -> Any:
        """See Worker.run; any replica may do it."""
        return await self._worker.run.remote(endpoint_id, request, needs=_digests(request))


class _WorkerReplica:
    def __init__(self, settings: ModelSettings) -> None:
        _join_logs()
        metrics.send_to(_RayMetrics())
        traces.start("worker")
        self._closing = ExitStack()  # has the worker only once there is one: a model may refuse to start
        self._closing.callback(traces.close)
        began = time.monotonic()
        from deployments.worker.worker import Worker  # imports torch, which only a replica needs

        name = serve.get_replica_context().app_name
        self._worker = Worker(settings, open_files(settings.files_url), name)
        self._closing.callback(self._worker.close)
        self._meter = Meter(time.monotonic() - began)

    async def generate(
        self, job: Job, needs: Sequence[str] = (), backlog: Backlog | None = None
    ) -> AsyncGenerator[Update]:
        """See Worker.generate. `needs` are for the router, the backlog for the autoscaling."""
        if backlog is not None:
            self._meter.hear(backlog)
        with self._meter.request():
            async for update in self._worker.generate(job):
                yield update

    async def prefetch(self, job: Job, needs: Sequence[str] = ()) -> None:
        """See Worker.prefetch. `needs` are for the router."""
        self._worker.prefetch(job)

    async def run(self, endpoint_id: str, request: EndpointInput, needs: Sequence[str] = ()) -> Any:
        """See Worker.run. `needs` are for the router."""
        with self._meter.request():
            return await self._worker.run(endpoint_id, request)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling is told of this replica."""
        return self._meter.told()

    def record_routing_stats(self) -> dict[str, Any]:
        """What the router is told of this replica, see Intake.holdings."""
        holdings = self._worker.intake.holdings()
        self._worker.measure(holdings.values())
        holds = {need: (held.tier, held.nbytes) for need, held in holdings.items()}
        return {"seconds": self._meter.seconds, "holds": holds}

    async def check_health(self) -> None:
        self._worker.check_health()

    def __del__(self) -> None:
        self._closing.close()


def _join_logs() -> None:
    """Send our own log lines, and what is said of traces that could not be sent, where Serve sends its: into
    this replica's file, with its fields."""
    for room in ("deployments", "pipelines", "opentelemetry"):
        logging.getLogger(room).parent = logger
        logging.getLogger(room).setLevel(logging.INFO)
    logs.install(logger)


def _open_sender(settings: FrontSettings) -> Sender:
    webhooks = settings.webhooks
    threads = ThreadPoolExecutor(webhooks.concurrency, thread_name_prefix="webhook-names")
    return Sender(
        open_outbox(settings.queue_url, webhooks.lease_s),
        Egress(webhooks, partial(resolve, threads=threads)),
        open_keyring(webhooks.keys, webhooks.key_overlap_s),
        webhooks,
    )


def _input_type(endpoint_id: str) -> type[EndpointInput]:
    return registry.endpoint(endpoint_id).input_type()


class _ServeModels:
    """The handles of the model applications, found by name when first needed."""

    def __init__(self) -> None:
        self._handles: dict[str, _ServeModel] = {}

    def connect(self, name: str) -> ModelHandle:
        if name not in self._handles:
            try:
                handle = serve.get_deployment_handle(WORKER, app_name=name)
            except RayServeException as error:
                raise NotReady(f"The application {name} is not deployed.") from error
            self._handles[name] = _ServeModel(handle)
        return self._handles[name]


class _ServeModel:
    """A model's DeploymentHandle as the dispatcher sees it; Ray's errors end here."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._generate = handle.options(method_name="generate", stream=True)
        self._prefetch = handle.options(method_name="prefetch")

    async def generate(self, job: Job, backlog: Backlog) -> AsyncGenerator[Update]:
        response = self._generate.remote(job, needs=_needs(job), backlog=backlog)
        with _translated():
            try:
                async for update in response:
                    yield update
            finally:
                response.cancel()

    async def prefetch(self, job: Job) -> None:
        response = self._prefetch.remote(job, needs=_needs(job))
        with _translated():
            try:
                await response
            finally:
                response.cancel()


def _needs(job: Job) -> tuple[str, ...]:
    """The weights that a job names, in the router's words."""
    kind = _input_type(job.endpoint_id)
    if not takes_weights(kind):
        return ()
    try:
        return _digests(kind.model_validate(job.input))
    except ValidationError:  # the worker says so
        return ()


def _digests(request: EndpointInput) -> tuple[str, ...]:
    return tuple(asset.digest for asset in weights(request))


class _RayMetrics:
    """Metrics as Ray's, made when they are first told of."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __call__(self, metric: metrics.Metric, value: float, labels: Mapping[str, str]) -> None:
        if metric.name not in self._made:
            self._made[metric.name] = self._make(metric)
        ours, tags = self._made[metric.name], dict(labels)
        if metric.kind == "counter":
            ours.inc(value, tags)
        elif metric.kind == "gauge":
            ours.set(value, tags)
        else:
            ours.observe(value, tags)

    @staticmethod
    def _make(metric: metrics.Metric) -> Any:
        if metric.kind == "counter":
            return serve_metrics.Counter(metric.name, metric.description, metric.labels)
        if metric.kind == "gauge":
            return serve_metrics.Gauge(metric.name, metric.description, metric.labels)
        return serve_metrics.Histogram(metric.name, metric.description, list(metric.buckets), metric.labels)


@contextmanager
def _translated() -> Iterator[None]:
    """Ray's errors become ours."""
    try:
        yield
    except RayActorError as error:
        raise WorkerLost("The worker died while it ran the request.") from error
    except RayTaskError as error:
        raise WorkerLost(f"The worker failed outside the request: {error}") from error
    except RayServeException as error:
        raise NotReady(f"No worker can be called: {error}") from error
