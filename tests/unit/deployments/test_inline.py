"""Pictures inside requests on their way to the file store."""

import base64
import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.files.store import open_files
from deployments.gateway.inline import KEEP_CHARACTERS, stored
from schemas.endpoints import flux_general_rf_inversion as general
from schemas.endpoints.flux_lora_image_to_image import Input
from schemas.errors import InputError
from schemas.settings import FrontSettings

BASE = "http://box:8000"


def picture(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((96, 96), 64).convert("RGB").save(buffer, format)
    return buffer.getvalue()


def data_uri(data: bytes, claimed: str = "image/png") -> str:
    return f"data:{claimed};base64,{base64.b64encode(data).decode()}"


async def store(tmp_path: Path, image_url: str, limit: int = 10**6) -> tuple[dict[str, Any], Any]:
    files = open_files(f"file://{tmp_path}/files")
    request = Input(prompt="x", image_url=image_url)
    return await stored(
        request, request.model_dump(mode="json"), files, BASE, FrontSettings(max_image_bytes=limit)
    ), files


@pytest.mark.parametrize(("format", "extension"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
async def test_a_long_data_uri_becomes_a_file_of_what_it_really_is(
    tmp_path: Path, format: str, extension: str
) -> None:
    data = picture(format)
    document, files = await store(tmp_path, data_uri(data, "image/gif"))
    url = document["image_url"]
    assert url.startswith(f"{BASE}/files/")
    assert url.endswith(extension)
    kept = await files.open(url.removeprefix(f"{BASE}/files/"))
    assert b"".join([chunk async for chunk in kept.chunks]) == data
    assert document["prompt"] == "x"


async def test_a_picture_in_several_fields_is_kept_once(tmp_path: Path) -> None:
    uri, other = data_uri(picture("PNG")), data_uri(picture("WEBP"))
    request = general.Input.model_validate(
        {
            "prompt": "x",
            "image_url": uri,
            "reference_image_url": other,
            "control_loras": [{"path": "a", "control_image_url": uri}],
        }
    )
    files = open_files(f"file://{tmp_path}/files")
    document = await stored(
        request, request.model_dump(mode="json"), files, BASE, FrontSettings(max_image_bytes=10**6)
    )
    assert document["control_loras"][0] == {
        "path": "a",
        "scale": 1,
        "control_image_url": document["image_url"],
        "preprocess": "None",
    }
    assert document["image_url"].endswith("png") and document["reference_image_url"].endswith("webp")
    assert len([path for path in (tmp_path / "files").iterdir() if path.is_file()]) == 2


@pytest.mark.parametrize("image_url", ["https://example.com/a.png", data_uri(b"x" * 99)])
async def test_urls_and_short_data_uris_stay(tmp_path: Path, image_url: str) -> None:
    document, _ = await store(tmp_path, image_url)
    assert document["image_url"] == image_url


@pytest.mark.parametrize(
    ("image_url", "limit", "kind"),
    [
        (data_uri(os.urandom(KEEP_CHARACTERS)), 10**6, "unsupported_image_format"),
        (data_uri(picture("PNG")), 1000, "file_too_large"),
        ("data:image/png;base64,!" + "A" * KEEP_CHARACTERS, 10**6, "file_download_error"),
    ],
)
async def test_what_no_worker_could_read_is_refused_at_submit(
    tmp_path: Path, image_url: str, limit: int, kind: str
) -> None:
    with pytest.raises(InputError) as raised:
        await store(tmp_path, image_url, limit)
    [fault] = raised.value.fields
    assert (fault.loc, fault.type) == (("body", "image_url"), kind)
    assert not list((tmp_path / "files").iterdir())
