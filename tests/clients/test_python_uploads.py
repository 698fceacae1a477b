"""Files from fal's Python client, both halves of it: what is uploaded can be read, and used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fal_client
import fal_client.client
import httpx
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from tests.clients.conftest import MAX_UPLOAD_BYTES
from tests.clients.halves import UPLOADING, Connect, settled
from tests.clients.inputs import REMAKE, REMAKE_EXAMPLE, drawing, picture
from tests.support.server import Server

pytestmark = UPLOADING


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads of more than 1 MB go in parts of 100 kB, ten at once."""
    monkeypatch.setattr(fal_client.client, "MULTIPART_THRESHOLD", 1_000_000)
    monkeypatch.setattr(fal_client.client, "MULTIPART_CHUNK_SIZE", 100_000)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of 25 parts and a bit."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(bytes(range(250)) * 10_001)
    return path


async def test_data_is_read_back_as_it_was_sent(fal: Any, server: Server, stranger: httpx.Client) -> None:
    url = await settled(fal.upload(b"Hello, World!", "text/plain; charset=utf-8", "hello.txt"))
    assert url.startswith(f"{server.url}/files/") and url.endswith("_hello.txt")
    answer = stranger.get(url)
    assert (answer.content, answer.headers["content-type"]) == (b"Hello, World!", "text/plain; charset=utf-8")


@pytest.mark.parametrize("repository", ["fal_v3", "fal"])
async def test_both_repositories_take_files(repository: str, fal: Any, stranger: httpx.Client) -> None:
    data = b"\0" * 300_000 + b"end"
    url = await settled(fal.upload(data, "application/x-thing", repository=repository))
    answer = stranger.get(url)
    assert (answer.content, answer.headers["content-type"]) == (data, "application/x-thing")


async def test_when_the_cdn_fails_the_other_repository_is_used(
    fal: Any, stranger: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fal_client.client, "CDN_URL", f"{stranger.base_url}/nowhere")
    url = await settled(fal.upload(b"x", "text/plain"))
    assert stranger.get(url).content == b"x"


async def test_a_file_and_an_image_keep_their_types(fal: Any, tmp_path: Path, stranger: httpx.Client) -> None:
    path = tmp_path / "start picture.webp"
    drawing().save(path)
    by_path = await settled(fal.upload_file(path))
    assert by_path.endswith("_start_picture.webp")
    by_image = await settled(fal.upload_image(drawing(), format="jpeg"))
    for url, kind in ((by_path, "webp"), (by_image, "jpeg")):
        answer = stranger.get(url)
        assert answer.headers["content-type"] == f"image/{kind}"
        assert picture(answer.content) == (kind.upper(), (80, 48))


async def test_a_large_file_goes_in_parts(
    fal: Any, in_parts: None, large: Path, server: Server, stranger: httpx.Client
) -> None:
    by_path = await settled(fal.upload_file(large))
    by_data = await settled(fal.upload(large.read_bytes(), "video/mp4"))
    assert by_path.startswith(f"{server.url}/files/") and by_path.endswith("_large.safetensors")
    for url, kind in ((by_path, "application/octet-stream"), (by_data, "video/mp4")):
        answer = stranger.get(url)
        assert answer.content == large.read_bytes()
        assert answer.headers["content-type"] == kind


async def test_what_the_client_sends_in_parts_by_itself_arrives_whole(
    fal: Any, tmp_path: Path, stranger: httpx.Client
) -> None:
    data = bytes(range(256)) * (101 * 2**12)  # more than 100 MiB, in 10 MiB each
    path = tmp_path / "large.bin"
    path.write_bytes(data)
    url = await settled(fal.upload_file(path))
    assert stranger.get(url).content == data


async def test_what_is_larger_than_the_server_takes_is_refused(fal: Any, tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(MAX_UPLOAD_BYTES + 1)
    with pytest.raises(fal_client.FalClientHTTPError, match=f"{MAX_UPLOAD_BYTES} bytes") as caught:
        await settled(fal.upload_file(path))
    assert (caught.value.status_code, caught.value.error_type) == (413, "request_too_large")


async def test_without_a_valid_key_nothing_is_taken(connect: Connect) -> None:
    intruder = connect("alice:guess")
    uploads: list[Callable[[], Any]] = [
        lambda: intruder.upload(b"x", "text/plain"),
        lambda: intruder.upload(b"x", "text/plain", repository="fal"),
    ]
    for upload in uploads:
        with pytest.raises((httpx.HTTPStatusError, fal_client.FalClientHTTPError)) as caught:
            await settled(upload())
        assert caught.value.response.status_code == 401


@pytest.mark.parametrize("repository", ["fal_v3", "fal"])
async def test_a_file_may_be_kept_for_a_while(repository: str, fal: Any, stranger: httpx.Client) -> None:
    for_an_hour = fal_client.StorageSettings(expires_in="1h")
    url = await settled(fal.upload(b"x", "text/plain", repository=repository, lifecycle=for_an_hour))
    assert stranger.get(url).status_code == 200


@pytest.mark.parametrize("repository", ["fal_v3", "fal"])
async def test_a_file_that_others_must_not_read_is_refused(repository: str, fal: Any) -> None:
    hidden = fal_client.StorageSettings(initial_acl=fal_client.StorageACL(default="forbid"))
    with pytest.raises(fal_client.FalClientHTTPError, match="initial_acl") as caught:
        await settled(fal.upload(b"x", "text/plain", repository=repository, lifecycle=hidden))
    assert caught.value.status_code == 400


async def test_an_uploaded_lora_changes_the_picture(
    fal: Any, flux_folder: Path, tmp_path: Path, stranger: httpx.Client
) -> None:
    start = await settled(fal.upload_image(drawing(), format="png"))
    style = await settled(fal.upload_file(lora(flux_folder, tmp_path / "style.safetensors")))
    fields = REMAKE_EXAMPLE | {"image_url": start, "output_format": "png", "seed": 7}
    pictures = []
    for loras in ([], [{"path": style, "scale": 2}], [{"path": style, "scale": 2}]):
        output = await settled(fal.subscribe(REMAKE, fields | {"loras": loras}))
        pictures.append(stranger.get(output["images"][0]["url"]).content)
    assert pictures[0] != pictures[1] == pictures[2]


def lora(flux_folder: Path, path: Path) -> Path:
    """A LoRA on one layer of the embedded FLUX."""
    weights = FluxTransformer2DModel.from_pretrained(flux_folder, subfolder="transformer")
    target = "transformer_blocks.0.attn.to_v"
    rows, columns = weights.get_submodule(target).weight.shape
    down, up = torch.ones(2, columns), torch.ones(rows, 2)
    name = f"transformer.{target}"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    return path


async def test_a_file_is_no_picture_by_its_name(fal: Any) -> None:
    url = await settled(fal.upload(b"no picture", "image/png", "cat.png"))
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        await settled(fal.subscribe(REMAKE, REMAKE_EXAMPLE | {"image_url": url}))
    [detail] = caught.value.message
    assert detail["loc"] == ["body", "image_url"]
    assert detail["type"] in ("image_load_error", "unsupported_image_format")
