"""Disks that cannot be read: each call is told so and can be made again, and the log says why, once."""

import asyncio
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from deployments.queue.sqlite import READERS
from tests.faults import disks
from tests.support.gateway import Place
from tests.support.jobs import ENDPOINT

APP = "fal-ai/flux"
INPUT = {"prompt": "a cat"}


async def made(http: httpx.AsyncClient) -> httpx.Response:
    answer = await http.post(f"/run/{ENDPOINT}", json=INPUT)
    assert answer.status_code == 200
    return answer


def outdate_memory(path: Path) -> None:
    """Write to a database from elsewhere, so that whoever has it open must read it anew."""
    with closing(sqlite3.connect(path)) as connection:
        [number] = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version={number + 1}")


async def refused(http: httpx.AsyncClient, url: str, caplog: pytest.LogCaptureFixture, why: str) -> None:
    """It is a fault of ours that passes, and of which the log has one line, by the id that the caller has."""
    answer = await http.get(url)
    assert answer.status_code == 503
    assert answer.headers["x-fal-retryable"] == "true"
    call_id = answer.headers["x-fal-request-id"]
    [line] = [each.getMessage() for each in caplog.records if call_id in each.getMessage()]
    assert line.startswith(f"GET {url} failed") and why in line
    assert "\n" not in line


async def test_f12_a_queue_that_cannot_be_read_says_so_and_goes_on_later(
    place: Place, alice: httpx.AsyncClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    together = threading.Barrier(READERS)  # all of whom have the file open from then on
    read = place.queue._database.read
    await asyncio.gather(*(read(lambda _: together.wait(60)) for _ in range(READERS)))
    first = await made(alice)
    url = f"/queue/{APP}/requests/{first.headers['x-fal-request-id']}"
    with disks.unreadable(tmp_path / "queue.sqlite3-wal"):
        for asked in (url, f"{url}/status", "/v1/models/requests"):
            outdate_memory(tmp_path / "queue.sqlite3")
            await refused(alice, asked, caplog, "malformed")
        lost = await alice.post(f"/queue/{ENDPOINT}", json=INPUT, headers={"idempotency-key": "k"})
    assert lost.status_code in (200, 503)
    again = await alice.post(f"/queue/{ENDPOINT}", json=INPUT, headers={"idempotency-key": "k"})
    assert again.status_code == 200
    assert (await alice.get(url)).json() == first.json()
    await made(alice)
    listed = (await alice.get("/v1/models/requests")).json()["items"]
    assert len(listed) == 3


async def test_f12_a_file_that_cannot_be_read_is_an_error_and_no_torn_picture(
    place: Place, alice: httpx.AsyncClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = httpx.URL((await made(alice)).json()["images"][0]["url"]).path
    whole = await alice.get(url)
    path = tmp_path / url.lstrip("/")
    aside = path.rename(tmp_path / "aside")
    path.symlink_to(path)  # which no one can open
    await refused(alice, url, caplog, "Too many levels of symbolic links")
    aside.replace(path)
    assert (await alice.get(url)).content == whole.content
