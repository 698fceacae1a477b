"""Python callers inside the cluster."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support.server import ROOT, Server

REFUSED = """
import ray
from ray import serve
from schemas.errors import DarkroomError

ray.init(namespace="serve", log_to_driver=False)
for endpoint_id, fields in (("fal-ai/flux/dev", {}), ("fal-ai/nope", {"prompt": "x"})):
    try:
        serve.get_app_handle("darkroom").run.remote(endpoint_id, fields).result()
    except DarkroomError as error:
        print(error.status, error.message)
"""


def call(server: Server, *arguments: str) -> list[str]:
    ray = {"RAY_ADDRESS": server.ray_address, "RAY_AUTH_MODE": "token"}
    environment = {**os.environ, **ray, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_example_gets_typed_pictures_from_both_handles(server: Server) -> None:
    lines = [line.split() for line in call(server, "examples/python_caller.py")]
    assert [(way, seed) for way, _, seed in lines] == [("queued", "7"), ("direct", "7")]
    pictures = [Path(url.removeprefix("file://")) for _, url, _ in lines]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    with Image.open(pictures[0]) as image:
        assert image.size == (256, 256)


def test_a_wrong_call_raises_what_an_http_caller_would_be_told(server: Server) -> None:
    assert call(server, "-c", REFUSED) == [
        "422 prompt: Field required",
        '404 Application "fal-ai/nope" not found',
    ]
