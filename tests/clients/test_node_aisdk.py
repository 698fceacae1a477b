"""Vercel's AI SDK (`ai` and `@ai-sdk/fal`), which takes a base URL."""

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.inputs import ALICE, APP, drawing, encoded, picture
from tests.clients.test_python_uploads import lora
from tests.clients.test_uploads_wire import upload
from tests.support.node import NODE
from tests.support.server import Server


@pytest.fixture(scope="module")
def told(
    server: Server,
    alice: httpx.Client,
    node_packages: Path,
    flux_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What one run of everything came to."""
    folder: Path = tmp_path_factory.mktemp("aisdk")
    (folder / "start.png").write_bytes(encoded(drawing()))
    weights = lora(flux_folder, folder / "lora.safetensors").read_bytes()
    url = upload(alice, weights, "application/octet-stream", "lora.safetensors")
    done = subprocess.run(
        ["node", "aisdk.mjs", f"{server.url}/run"],
        cwd=NODE,
        env={**os.environ, "FAL_KEY": ALICE},
        input=json.dumps({"file": str(folder / "start.png"), "lora": url}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize(
    ("call", "count", "size"),
    [
        ("drawn", 1, (96, 64)),
        ("several", 2, (96, 64)),
        ("shaped", 1, (576, 1024)),
        ("inline", 1, (96, 64)),  # as a data URI
        ("remade", 1, (80, 48)),
        ("byOption", 1, (80, 48)),
        ("withLora", 1, (80, 48)),
    ],
)
def test_it_has_the_pictures(call: str, count: int, size: tuple[int, int], told: dict[str, Any]) -> None:
    answer = told[call]
    assert len(answer["images"]) == count, answer
    for image, details in zip(answer["images"], answer["details"], strict=True):
        assert image["mediaType"] == details["contentType"] == "image/jpeg"
        assert picture(base64.b64decode(image["base64"])) == ("JPEG", size)
        assert (details["width"], details["height"], details["nsfw"]) == (*size, False)
    assert answer["warnings"] == []


def test_a_request_is_found_again_by_the_id_that_is_told(told: dict[str, Any], alice: httpx.Client) -> None:
    [request_id] = told["drawn"]["ids"]
    assert alice.get(f"/queue/{APP}/requests/{request_id}").json()["seed"] == 7


def test_a_lora_makes_another_picture(told: dict[str, Any]) -> None:
    assert told["withLora"]["images"] != told["remade"]["images"]


@pytest.mark.parametrize(
    ("mistake", "status", "message"),
    [
        ("wrong", 422, "body.num_images: Input should be less than or equal to 4"),
        ("wrongInside", 422, "loras.0.scale: Input should be less than or equal to 4"),
        ("unknown", 404, 'Application "fal-ai/nope" not found'),
        ("wrongKey", 401, "invalid key credentials"),
    ],
)
def test_a_refusal_says_why_and_is_final(
    mistake: str, status: int, message: str, told: dict[str, Any]
) -> None:
    error = told[mistake]
    assert (error["name"], error["statusCode"]) == ("AI_APICallError", status)
    assert (error["message"], error["isRetryable"]) == (message, False)
