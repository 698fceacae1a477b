"""Pictures inside a request's text: the picture that is meant, or a 422 that names the field."""

import base64
import io
import tracemalloc
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes

import httpx
import pytest
from PIL import Image

from deployments.files.fetch import decode_data_uri
from deployments.gateway.inline import KEEP_CHARACTERS
from schemas.errors import AssetError
from tests.gateway.conftest import ALICE
from tests.support.gateway import gateway_at_work

ENDPOINT = "fal-ai/flux-lora/image-to-image"


def picture(format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((96, 96), 64).convert("RGB").save(buffer, format)
    return buffer.getvalue()


def written(format: str) -> str:
    return base64.b64encode(picture(format)).decode()


GZIP = b"\x1f\x8b" + bytes(9000)
DATA = picture()
DATA += bytes(2 - len(DATA) % 3)  # its base64 is padded
TEXT = base64.b64encode(DATA).decode()
assert len(TEXT) > KEEP_CHARACTERS

# what is sent, and what it means
GOOD: dict[str, str] = {
    "as usual": f"data:image/png;base64,{TEXT}",
    "another type": f"data:image/gif;base64,{TEXT}",
    "the type of a page": f"data:text/html;base64,{TEXT}",
    "no type": f"data:;base64,{TEXT}",
    "no type and no name of it": f"data:;BASE64,{TEXT}",
    "a type that is none": f"data:../../etc/passwd;base64,{TEXT}",
    "a charset": f"data:image/png;charset=utf-8;base64,{TEXT}",
    "many parameters": f"data:image/png;{'a=b;' * 100}base64,{TEXT}",
    "a quoted parameter": f'data:image/png;name="cat.png";base64,{TEXT}',
    "capital letters": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "spaces in the header": f"data: image/png ; base64 ,{TEXT}",
    "base64 with escapes": f"data:image/png;base64,{quote(TEXT, safe='')}",
    "bytes with escapes": f"data:image/png,{quote_from_bytes(DATA)}",
    "every byte with an escape": f"data:image/png,{''.join(f'%{each:02x}' for each in DATA)}",
}

# what is no picture, and why
BAD: dict[str, tuple[str, str]] = {
    "no comma": (f"data:image/png;base64;{TEXT}", "file_download_error"),
    "a header without end": ("data:" + "a" * 5000 + f",{TEXT}", "file_download_error"),
    "nothing": ("data:image/png," + " " * 5000, "unsupported_image_format"),
    "base64 of noise": ("data:image/png;base64," + "!?" * 3000, "file_download_error"),
    "base64 that ends amiss": (f"data:image/png;base64,{TEXT}A", "file_download_error"),
    "base64 without its padding": (f"data:image/png;base64,{TEXT.rstrip('=')}", "file_download_error"),
    "base64 in lines": (
        f"data:image/png;base64,{base64.encodebytes(DATA).decode()}",
        "file_download_error",
    ),
    "spaces around it": (f"data:image/png;base64, {TEXT} ", "file_download_error"),
    "padding in the middle": (f"data:image/png;base64,{TEXT[:100]}=={TEXT[100:]}", "file_download_error"),
    "base64 for URLs": (
        f"data:image/png;base64,{base64.urlsafe_b64encode(DATA).decode()}",
        "file_download_error",
    ),
    "both alphabets": (f"data:image/png;base64,{'+/-_' * 2000}", "file_download_error"),
    "letters of another script": ("data:image/png;base64," + "\u0430" * 5000, "file_download_error"),
    "a NUL": (f"data:image/png;base64,{TEXT[:50]}%00{TEXT[50:]}", "file_download_error"),
    "an escape cut short": (f"data:image/png;base64,{TEXT}%4", "file_download_error"),
    "an escape that is none": (f"data:image/png,{'%zz' * 3000}", "file_download_error"),
    "base64 that is not said": (f"data:image/png,{TEXT}", "unsupported_image_format"),
    "base64 said too early": (f"data:base64;image/png,{TEXT}", "unsupported_image_format"),
    "a URI inside": (
        f"data:image/png;base64,{base64.b64encode(f'data:image/png;base64,{TEXT}'.encode()).decode()}",
        "unsupported_image_format",
    ),
    "a URI after a URI": (f"data:image/png;base64,data:image/png;base64,{TEXT}", "file_download_error"),
    "a page": ("data:text/html," + "<b>no</b>" * 1000, "unsupported_image_format"),
    "a drawing": ("data:image/svg+xml," + "<svg/>" * 1000, "unsupported_image_format"),
    "a script": ("data:text/javascript," + "alert(1);" * 1000, "unsupported_image_format"),
    "a GIF": (
        f"data:image/png;base64,{base64.b64encode(picture('GIF')).decode()}",
        "unsupported_image_format",
    ),
    "a BMP": (
        f"data:image/png;base64,{base64.b64encode(picture('BMP')).decode()}",
        "unsupported_image_format",
    ),
    "gzip": (
        f"data:image/png;base64,{base64.b64encode(GZIP).decode()}",
        "unsupported_image_format",
    ),
    "too large": (f"data:image/png;base64,{'A' * 3_000_000}", "file_too_large"),
    "too large, as escapes": (f"data:image/png,{'%41' * 1_100_000}", "file_too_large"),
    "too large, as spaces": (f"data:image/png;base64,{' ' * 3_000_000}", "file_too_large"),
}
LIMIT = 10**6


@pytest.fixture
async def sends(tmp_path: Path) -> Any:
    async with gateway_at_work(tmp_path, keys=ALICE, max_image_bytes=LIMIT) as place:
        place.model.open.set()
        headers = {"authorization": f"Key {ALICE}"}
        async with httpx.AsyncClient(base_url=place.url, headers=headers, timeout=60) as client:
            yield tmp_path / "files", client


def test_t17_there_are_many() -> None:
    assert len(GOOD) + len(BAD) >= 30


@pytest.mark.parametrize("name", GOOD)
async def test_t17_the_picture_that_is_meant_is_kept(
    name: str, sends: tuple[Path, httpx.AsyncClient]
) -> None:
    folder, client = sends
    answer = await client.post(f"/queue/{ENDPOINT}", json={"prompt": "x", "image_url": GOOD[name]})
    assert answer.status_code == 200, answer.text
    assert DATA in [path.read_bytes() for path in folder.iterdir() if path.is_file()]


@pytest.mark.parametrize("name", BAD)
async def test_t17_what_is_no_picture_is_a_422_that_names_the_field(
    name: str, sends: tuple[Path, httpx.AsyncClient]
) -> None:
    _, client = sends
    uri, kind = BAD[name]
    for path in ("queue", "run"):
        answer = await client.post(f"/{path}/{ENDPOINT}", json={"prompt": "x", "image_url": uri})
        assert answer.status_code == 422, answer.text[:200]
        [fault] = answer.json()["detail"]
        assert (fault["loc"], fault["type"]) == (["body", "image_url"], kind)
        assert len(answer.content) < 2000


@pytest.mark.parametrize("name", [name for name in BAD if name.startswith("too large")])
def test_t17_what_is_too_large_is_refused_before_it_is_decoded(name: str) -> None:
    uri, _ = BAD[name]
    tracemalloc.start()
    try:
        with pytest.raises(AssetError):
            decode_data_uri(uri, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(uri)
    finally:
        tracemalloc.stop()
