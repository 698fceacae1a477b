"""Files over HTTP, without the rest of the gateway."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.routing import Router

from deployments.files.store import FileStore, open_files
from deployments.gateway import downloads, middleware
from tests.support.uploading import Clock

YEAR = 365 * 86_400


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(tmp_path: Path, clock: Clock) -> FileStore:
    return open_files(f"file://{tmp_path}/files", clock)


@pytest.fixture
async def http(files: FileStore) -> AsyncIterator[httpx.AsyncClient]:
    app = middleware.Headers(middleware.Errors(Router(downloads.routes(files))))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://box/files/") as client:
        yield client


async def test_a_file_has_a_tag_that_spares_its_bytes(files: FileStore, http: httpx.AsyncClient) -> None:
    key, other = await files.save(b"one", "image/png"), await files.save(b"one", "image/png")
    tag = (await http.get(key)).headers["etag"]
    assert tag == f'"{key[:32]}"' == (await http.head(key)).headers["etag"]
    for text in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        answer = await http.get(key, headers={"if-none-match": text})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
        assert "cache-control" in answer.headers
    for text in ("", '"x"', (await http.get(other)).headers["etag"]):
        answer = await http.get(key, headers={"if-none-match": text})
        assert (answer.status_code, answer.content) == (200, b"one")


async def test_a_range_is_of_the_file_that_was_begun(files: FileStore, http: httpx.AsyncClient) -> None:
    key = await files.save(b"0123456789", "image/png")
    asked = {"range": "bytes=2-4"}
    same = await http.get(key, headers=asked | {"if-range": f'"{key[:32]}"'})
    assert (same.status_code, same.content) == (206, b"234")
    for other in ('"x"', "Sat, 21 Nov 2026 00:00:00 GMT", f'W/"{key[:32]}"'):
        answer = await http.get(key, headers=asked | {"if-range": other})
        assert (answer.status_code, answer.content) == (200, b"0123456789")


@pytest.mark.parametrize(("keep_s", "ahead", "least", "most"), [(None, 0, YEAR, YEAR), (600, 500, 97, 100)])
async def test_no_cache_outlives_the_file(
    keep_s: int | None,
    ahead: float,
    least: int,
    most: int,
    files: FileStore,
    http: httpx.AsyncClient,
    clock: Clock,
) -> None:
    key = await files.save(b"x", "image/png", keep_s)
    clock.ahead = ahead
    told = (await http.get(key)).headers["cache-control"]
    assert least <= int(told.split("max-age=")[1].split(",")[0]) <= most


async def test_a_file_whose_time_is_over_is_as_one_that_never_was(
    files: FileStore, http: httpx.AsyncClient, clock: Clock
) -> None:
    key = await files.save(b"x", "image/png", 60)
    clock.ahead = 61
    over, never = await http.get(key), await http.get(f"{'0' * 32}.png")
    for answer in (over, never, await http.get(key, headers={"if-none-match": "*"})):
        assert answer.status_code == 404
        assert answer.json() == {
            "detail": "File not found",
            "error_type": "not_found",
            "message": "File not found",
        }
        assert answer.headers["x-fal-error-type"] == "not_found"
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "cache-control" not in answer.headers
