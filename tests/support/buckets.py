"""A server that speaks S3, in a process of its own."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.support.server import free_port

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "darkroom",
    "AWS_SECRET_ACCESS_KEY": "s3cret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_at_work() -> Iterator[str]:
    """Its address."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    # it logs each request: a pipe that nobody reads would fill, and stop it
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not _listens(port):
            assert process.poll() is None, "moto's server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def files_url(s3: str, bucket: str, options: str = "") -> str:
    """The setting for a new bucket."""
    httpx.put(f"{s3}/{bucket}").raise_for_status()
    return f"s3://{bucket}/some/prefix?endpoint={s3}{options}"
