"""A server that speaks S3, in a process of its own."""

import subprocess
import sys
import threading
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
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = process.stderr
    try:
        told = ""
        while "Running on" not in told:
            told = lines.readline()
            assert told, "moto's server did not start"
        rest = threading.Thread(target=lines.read)  # a pipe that nobody reads would stop it
        rest.start()
        yield f"http://127.0.0.1:{port}"
        process.kill()
        rest.join()
    finally:
        process.kill()
        process.wait()
        lines.close()


def files_url(s3: str, bucket: str, options: str = "") -> str:
    """The setting for a new bucket."""
    httpx.put(f"{s3}/{bucket}").raise_for_status()
    return f"s3://{bucket}/some/prefix?endpoint={s3}{options}"
