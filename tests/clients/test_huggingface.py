"""Hugging Face's clients with the provider fal-ai, which know no other server: under `darkroom exec`."""

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference._providers import PROVIDERS
from huggingface_hub.inference._providers._common import HARDCODED_MODEL_INFERENCE_MAPPING

from tests.clients.inputs import ALICE, ENDPOINT, REMAKE, drawing, encoded, picture
from tests.support.node import NODE
from tests.support.programs import done, environment, under_exec
from tests.support.server import Server

APP = Path(__file__).parent / "apps" / "huggingface.py"
SMALL: dict[str, Any] = {"num_inference_steps": 3, "seed": 7}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    path = tmp_path / "start.png"
    path.write_bytes(encoded(drawing()))
    return path


def run(server: Server, folder: Path, cwd: Path, *command: str | Path) -> dict[str, Any]:
    variables = environment(folder, FAL_KEY=ALICE, HF_TOKEN=ALICE, HF_HUB_OFFLINE="0")
    ended = done(under_exec(server.url, *command), variables, cwd)
    assert ended.returncode == 0, ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


def test_a_python_app_runs_unchanged(server: Server, start: Path, tmp_path: Path) -> None:
    """Pictures from text by a run, pictures from pictures by the queue, whose URLs it follows by their paths
    alone."""
    told = run(server, tmp_path, start.parent, sys.executable, APP, start)
    assert picture(base64.b64decode(told["drawn"])) == ("PNG", (96, 64))
    assert picture(base64.b64decode(told["remade"])) == ("PNG", (80, 48))


def test_a_node_app_runs_unchanged(server: Server, node_packages: Path, start: Path, tmp_path: Path) -> None:
    told = run(server, tmp_path, NODE, "node", "huggingface.mjs", start)
    assert picture(base64.b64decode(told["drawn"])) == ("JPEG", (96, 64))
    assert told["url"].startswith(f"{server.url}/files/")
    assert picture(base64.b64decode(told["remade"])) == ("JPEG", (80, 48))
    assert told["wrong"]["status"] == 422
    assert told["wrong"]["body"]["message"].startswith("num_inference_steps: Input should be less than")


# --- told where the server is, as docs/how-to/clients.md shows ---


@pytest.fixture
def models(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, task, endpoint in [
        ("someone/draws", "text-to-image", ENDPOINT),
        ("someone/remakes", "image-to-image", REMAKE),
        ("someone/does-nothing", "text-to-image", "fal-ai/nope"),
    ]:
        mapping = InferenceProviderMapping(  # type: ignore[no-untyped-call]
            provider="fal-ai", hf_model_id=name, providerId=endpoint, status="live", task=task
        )
        monkeypatch.setitem(HARDCODED_MODEL_INFERENCE_MAPPING["fal-ai"], name, mapping)
    for helper in PROVIDERS["fal-ai"].values():
        service = "queue" if "queue." in helper.base_url else "run"
        monkeypatch.setattr(helper, "base_url", f"{server.url}/{service}")


@pytest.fixture
def client(models: None) -> Iterator[InferenceClient]:
    yield InferenceClient(provider="fal-ai", api_key=ALICE)


def test_fields_that_only_the_endpoint_knows_go_along(client: InferenceClient, start: Path) -> None:
    size = {"image_size": {"width": 64, "height": 96}}
    drawn = client.text_to_image("a lighthouse", model="someone/draws", extra_body={**SMALL, **size})
    assert drawn.size == (64, 96)
    given: dict[str, Any] = {**SMALL, "output_format": "png"}
    remade = client.image_to_image(start, prompt="a lion", model="someone/remakes", **given)
    assert (remade.format, remade.size) == ("PNG", (80, 48))


def test_a_picture_gets_the_size_that_is_asked_for(client: InferenceClient, start: Path) -> None:
    size: Any = {"width": 64, "height": 96}
    remade = client.image_to_image(start, prompt="a lion", model="someone/remakes", target_size=size, **SMALL)
    assert remade.size == (64, 96)


async def test_the_asynchronous_half_gets_pictures_too(models: None, start: Path) -> None:
    async with AsyncInferenceClient(provider="fal-ai", api_key=ALICE) as client:
        drawn = await client.text_to_image(
            "a lighthouse", model="someone/draws", width=64, height=64, **SMALL
        )
        remade = await client.image_to_image(start, prompt="a lion", model="someone/remakes", **SMALL)
    assert (drawn.size, remade.size) == ((64, 64), (80, 48))


@pytest.mark.parametrize(
    ("model", "key", "status", "told"),
    [
        ("someone/draws", ALICE, 422, "num_inference_steps: Input should be less than or equal to 50"),
        ("someone/does-nothing", ALICE, 404, 'Application "fal-ai/nope" not found'),
        ("someone/draws", "alice:guess", 401, "invalid key credentials"),
    ],
)
def test_a_refusal_says_why(model: str, key: str, status: int, told: str, models: None) -> None:
    client = InferenceClient(provider="fal-ai", api_key=key)
    with pytest.raises(HfHubHTTPError) as raised:
        client.text_to_image("a lighthouse", model=model, num_inference_steps=99)
    assert raised.value.response is not None
    assert (raised.value.response.status_code, raised.value.response.json()["message"]) == (status, told)
