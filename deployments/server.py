"""Starts Ray and Serve from a configuration file, on this machine, for `darkroom serve`."""

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from pydantic import ValidationError

from pipelines import registry
from schemas.settings import Catalogue, FrontSettings, ModelSettings, Settings

READY_TIMEOUT_S = 600.0
POLL_S = 0.2

MODEL = "deployments.app:model"  # the builder of a model's application

HEAD_S = 30  # how long a connection may take to send a request's headers

# Set before Ray is imported, unless the operator has said otherwise.
DEFAULT_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",  # several times less time per request than the Python proxy
    # Serve writes no limit for headers into HAProxy's file and has no option for one: without it, whoever
    # drips them holds one of 4096 connections for good. The value below is copied there as it is.
    "RAY_SERVE_HAPROXY_RETRY_ON": f"conn-failure\n    timeout http-request {HEAD_S}s",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # a foreground server has no balancer to warn
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Our replicas never block their loop, so calls between them need neither threads of their own nor
    # Ray's object store: a third less time per request. The limit is for pictures in sync mode.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.gateway.edge:middlewares",
    "RAY_AUTH_MODE": "token",  # Ray runs whatever it is told: only who has the token may tell it
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # uvicorn would take X-Forwarded-For from whatever is on this machine, and Serve's HAProxy, which is,
    # passes on what any client writes there; the setting `proxies` says what to believe
    "FORWARDED_ALLOW_IPS": "",
}

# The same for nodes that KubeRay starts, where nobody calls `darkroom serve`.
CLUSTER_ENVIRONMENT = DEFAULT_ENVIRONMENT | {
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "30",  # until balancers have noticed
}

REPLICA_PORTS = 100  # HAProxy talks straight to the replicas, a port each
INNER_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",  # takes the traffic while no replica is up
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)


def load_config(path: Path, host: str | None, port: int | None, device: str | None = None) -> dict[str, Any]:
    """The configuration, with the address and the models' device replaced where they are given.

    Raises ValueError for what could not be deployed: better now than when Ray has started.
    """
    config = read_config(path)
    given = {"host": host, "port": port}
    config["http_options"] = (config.get("http_options") or {}) | {
        name: value for name, value in given.items() if value is not None
    }
    if device is not None:
        _put_on(device, config["applications"])
    check_config(config)
    return config


def read_config(path: Path) -> dict[str, Any]:
    """A configuration as it stands in a file, its settings unchecked. Raises ValueError."""
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("applications"), list):
        raise ValueError(f"{path} must be a mapping with a list of applications")
    return config


def check_config(config: dict[str, Any]) -> None:
    """Raise ValueError for settings that an application would refuse, and for routes that lead nowhere."""
    for application in config["applications"]:
        _check(application)
    _check_routes(config["applications"])


def _check_routes(applications: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError for an endpoint that leads to an application here which does not serve it.

    One that is not here may be deployed on its own.
    """
    served = {
        each.get("name"): (each.get("args") or {}).get("endpoints") or ()
        for each in applications
        if each.get("import_path") == MODEL
    }
    for application in applications:
        for deployment in application.get("deployments") or []:
            catalogue = Catalogue.model_validate(deployment.get("user_config") or {"models": {}})
            for endpoint_id, name in catalogue.routes().items():
                if name in served and endpoint_id not in served[name]:
                    place = f"user_config of {deployment.get('name')}"
                    raise ValueError(f"{place}: {endpoint_id} leads to {name}, which does not serve it")


def _put_on(device: str, applications: Iterable[dict[str, Any]]) -> None:
    """All models on another device than their own; a CPU is no GPU and computes in float32."""
    change = {"device": device} | ({"num_gpus": 0, "dtype": "float32"} if device == "cpu" else {})
    for application in applications:
        if application.get("import_path") == MODEL:
            application["args"] = (application.get("args") or {}) | change


def _check(application: dict[str, Any]) -> None:
    """Read an application's settings as its builder will."""
    builder = str(application.get("import_path")).removeprefix("deployments.app:")
    kinds: dict[str, type[Settings]] = {"front": FrontSettings, "model": ModelSettings}
    if kind := kinds.get(builder):
        _validate(kind, application.get("args") or {}, f"application {application.get('name')}")
    for deployment in application.get("deployments") or []:
        if catalogue := deployment.get("user_config"):
            _validate(Catalogue, catalogue, f"user_config of {deployment.get('name')}")


def _validate(kind: type[Settings], data: Any, place: str) -> None:
    try:
        settings = kind.model_validate(data)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"{place}: {'; '.join(faults)}") from None
    endpoints: Iterable[str] = ()
    if isinstance(settings, Catalogue):
        endpoints = settings.routes()
    elif isinstance(settings, ModelSettings):
        endpoints = settings.endpoints
    elif isinstance(settings, FrontSettings):
        named = [
            each for model in settings.openai_models.values() for each in (model.generations, model.edits)
        ]
        endpoints = [each for each in named if each is not None]
    if unknown := [each for each in endpoints if each not in registry.ENDPOINTS]:
        known = ", ".join(registry.ENDPOINTS)
        raise ValueError(f"{place}: unknown endpoint {', '.join(unknown)}; known: {known}")


def front_settings(config: dict[str, Any]) -> FrontSettings:
    """The settings of the front in a configuration that has been checked. Raises ValueError without one."""
    for application in config["applications"]:
        if application.get("import_path") == "deployments.app:front":
            return FrontSettings.model_validate(application.get("args") or {})
    raise ValueError("the configuration has no application deployments.app:front")


def model_settings(config: dict[str, Any]) -> list[ModelSettings]:
    """The settings of the models in a configuration that has been checked."""
    models = (each for each in config["applications"] if each.get("import_path") == MODEL)
    return [ModelSettings.model_validate(each.get("args") or {}) for each in models]


def address(config: dict[str, Any]) -> str:
    """Where a client on this machine reaches the server."""
    options = config["http_options"]
    host = options.get("host", "0.0.0.0")
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{options.get('port', 8000)}"


@dataclass(frozen=True, slots=True)
class Started:
    """A Ray cluster of our own, with the applications submitted to it."""

    logs: Path
    ray_address: str  # for Python callers
    metrics_url: str  # for Prometheus


def start(config: dict[str, Any], *, verbose: bool) -> Started:
    """Start Ray and submit the applications. Returns before they are ready.

    Raises ValueError when the configuration is wrong or its port is taken.
    """
    import ray
    from ray.serve._private.api import serve_start  # what `serve run CONFIG` itself calls
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    if not _is_free(schema.http_options.port):
        raise ValueError(f"port {schema.http_options.port} is in use; choose another with --port")
    context = ray.init(
        address="local",
        namespace="serve",
        include_dashboard=False,
        log_to_driver=verbose,
        logging_level="INFO" if verbose else "WARNING",
    )
    client = serve_start(http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location)
    client.deploy_apps(schema)
    info = context.address_info
    metrics_url = f"http://{info['node_ip_address']}:{info['metrics_export_port']}/metrics"
    return Started(Path(info["session_dir"]) / "logs" / "serve", info["gcs_address"], metrics_url)


def wait_until_ready(url: str, stopped: threading.Event, report: Callable[[str], None]) -> None:
    """Wait until the first request would succeed, or `stopped`. Raises RuntimeError when it cannot."""
    from ray import serve

    deadline = time.monotonic() + READY_TIMEOUT_S
    told = ""
    while time.monotonic() < deadline and not stopped.wait(POLL_S):
        status = serve.status()
        states = {name: app.status.value for name, app in status.applications.items()}
        if failed := [name for name, state in states.items() if "FAILED" in state]:
            raise RuntimeError("\n".join(_why(status.applications[name], name) for name in failed))
        line = ", ".join(f"{name} {state.lower()}" for name, state in sorted(states.items()))
        if line != told:
            report(told := line)
        if set(states.values()) == {"RUNNING"} and _answers(f"{url}/ready"):
            return
    if not stopped.is_set():
        raise RuntimeError(f"not ready after {READY_TIMEOUT_S:.0f} s: {told}")


def _why(application: Any, name: str) -> str:
    """What Serve says of an application that failed, its deployments' own words included."""
    said = [application.message, *(each.message for each in application.deployments.values())]
    return "\n".join([f"{name} could not be started:", *(text for text in said if text)])


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False  # nothing listens yet


def stop() -> None:
    """Drain and end everything that `start` began, if it began."""
    import ray
    from ray import serve

    if not ray.is_initialized():
        return
    serve.shutdown()
    ray.shutdown()


def prepare_environment() -> None:
    """Set what Ray reads when it is imported."""
    for name, value in (DEFAULT_ENVIRONMENT | inner_ports()).items():
        os.environ.setdefault(name, value)


def inner_ports() -> dict[str, str]:
    """Free ports for Serve's own use, as its environment.

    They are fixed by default and shared by address reuse: two servers on one machine would answer each
    other's requests.
    """
    first = free_ports(REPLICA_PORTS + len(INNER_PORTS))
    replicas = {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + REPLICA_PORTS - 1),
    }
    inner = enumerate(INNER_PORTS, start=first + REPLICA_PORTS)
    return replicas | {name: str(port) for port, name in inner}


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on, below the ephemeral range."""
    while True:
        first = random.randrange(20_000, 32_000 - count)
        if all(_is_free(port) for port in range(first, first + count)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
