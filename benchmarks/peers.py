"""Servers of others, for ours to be measured beside."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, Popen

import httpx

from tests.support.server import ROOT, Server, free_port


@contextmanager
def peer(module: str, *args: object, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`python -m MODULE PORT ARGS` in a session of its own, from when /health answers to the block's end."""
    port = free_port()
    command = [sys.executable, "-m", module, str(port), *map(str, args)]
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    process = Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ours},
        stdout=DEVNULL,
        stderr=DEVNULL,
        text=True,
        start_new_session=True,
    )
    server = Server(f"http://127.0.0.1:{port}", process, Path(os.devnull))
    try:
        _wait_until_ready(server)
        yield server
    finally:
        server.kill()


def _wait_until_ready(server: Server) -> None:
    while True:
        assert server.process.poll() is None, "it did not start; is the extra `bench` installed?"
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health").is_success:
                return
        time.sleep(0.2)
