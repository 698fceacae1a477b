"""A real darkroom server in a process group of its own, for tests, benchmarks and examples."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 180.0
SHORT_LEASE = {"lease_s": 3, "heartbeat_s": 1, "backoff_s": 0}  # what was lost is soon found


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# The shipped file names the trained embedded models; those with random weights are smaller, hence faster.
QUICK = {
    "zoo:flux-world-redux": "zoo:flux-redux",
    "zoo:flux-world": "zoo:flux",
    "zoo:sdxl-world-canny": "zoo:sdxl-canny",
    "zoo:sdxl-world": "zoo:sdxl",
    "zoo:sd15-world": "zoo:sd15",
    "zoo:world-safety-checker": "zoo:safety-checker",
}


def write_config(
    folder: Path,
    *,
    front: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    models: Collection[str] = ("flux",),
) -> Path:
    """The shipped serve_config.yaml with its data in `folder`, quick models, short prompts, other args.

    Of the model applications only `models` remain.
    """
    text = (ROOT / "serve_config.yaml").read_text()
    for trained, random in QUICK.items():
        text = text.replace(trained, random)
    config: dict[str, Any] = yaml.safe_load(text)
    front_app, *model_apps = config["applications"]
    files = f"file://{folder}/files"
    front_app["args"] |= {"queue_url": f"sqlite:///{folder}/queue.sqlite3", "files_url": files}
    front_app["args"] |= front or {}
    webhooks = {"keys": f"file://{folder}/webhook-keys"}
    front_app["args"]["webhooks"] = webhooks | (front or {}).get("webhooks", {})
    for deployment in front_app["deployments"]:
        catalogue = deployment["user_config"]["models"]
        # what the trained models are shown with is beyond those of random weights
        deployment["user_config"] = {"models": {name: catalogue[name] | {"example": None} for name in models}}
    config["applications"] = [front_app, *(app for app in model_apps if app["name"] in models)]
    for app in config["applications"][1:]:
        app["args"] |= {"files_url": files, "max_sequence_length": 32}
        app["args"] |= model or {}
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Server:
    """A running `darkroom serve`."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def ray_address(self) -> str:
        """Where Python callers find its Ray."""
        [address] = re.findall(r"^ray at (\S+)$", self.log.read_text(), re.MULTILINE)
        return str(address)

    @property
    def metrics_url(self) -> str:
        """What Prometheus reads."""
        [url] = re.findall(r"^metrics at (\S+)$", self.log.read_text(), re.MULTILINE)
        return str(url)

    @property
    def ray_logs(self) -> Path:
        """The folder in which Ray and everything that it runs log."""
        [serve] = re.findall(r"^logs in (\S+)$", self.log.read_text(), re.MULTILINE)
        return Path(serve).parent

    def stop(self) -> int:
        """As Ctrl-C does; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def kill(self) -> None:
        """SIGKILL to the server and everything that it started, Ray's processes included."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)

    def pids(self, name: str = "") -> list[int]:
        """The processes of the server's session whose command line has `name` in it."""
        session = [pid for pid in _all_pids() if _session(pid) == self.process.pid]
        return [pid for pid in session if name in _command(pid)]


def start(
    config: Path, *, keys: str = "", port: int | None = None, environment: Mapping[str, str] | None = None
) -> Server:
    """Start a server and wait until it is ready. `keys`: ID:SECRET pairs, none for no authentication."""
    ours = {"DARKROOM_KEYS": keys, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    log = config.parent / "server.log"
    port = port or free_port()
    command = [sys.executable, "-m", "deployments.cli", "serve", "--config", str(config)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--verbose"],
            cwd=ROOT,
            env={**os.environ, **ours, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while f"ready on {server.url}" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text()[-5000:]
            server.kill()
            raise RuntimeError(f"the server did not start:\n{said}")
        time.sleep(0.2)
    return server
