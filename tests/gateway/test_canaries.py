"""Six secrets go through a server on which everything goes wrong, and are found only where they belong."""

import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from deployments import logs
from deployments.files.store import open_files
from deployments.queue import open_queue
from deployments.webhooks.keyring import open_keyring
from schemas.errors import InternalError, StoreDown, WorkerLost
from schemas.jobs import Job, JobResult
from schemas.settings import LeaseSettings
from tests.support.canaries import leaks
from tests.support.gateway import Place, gateway_at_work
from tests.support.jobs import ENDPOINT

KEY_SECRET = "c4n4ry-key-1f0b"
URL_SECRET = "c4n4ry-url-77aa"
S3_SECRET = "c4n4ry-s3-90cd"
DB_SECRET = "c4n4ry-db-e1e2"
PICTURE = "fal-ai/flux-lora/image-to-image"


class Written(logging.Handler):
    """What the log files of both forms would have."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._forms = (logs.Plain(logging.Formatter("%(levelname)s %(message)s")), logs.Json())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += [form.format(record) for form in self._forms]


@pytest.fixture
def written() -> Iterator[Written]:
    root, handler = logging.getLogger("deployments"), Written()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with gateway_at_work(tmp_path / "server", keys=f"alice:{KEY_SECRET}") as place:
        place.model.open.set()
        yield place


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    (tmp_path / "server").mkdir()
    return tmp_path


async def test_t23_no_secret_is_found_where_it_does_not_belong(
    place: Place, folder: Path, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring = open_keyring(f"file://{folder}/keys", 0)
    keyring.sign(b"x")  # draws a key
    [key_file] = (folder / "keys").glob("*.pem")
    private = key_file.read_text().splitlines()[1]
    heard: list[str] = []
    tickets: list[str] = []
    async with httpx.AsyncClient(base_url=place.url, timeout=30) as client:
        async for answer in _scenario(client, place, monkeypatch):
            ticket = re.search(r"ticket=([\w.-]+)", answer.text)
            if ticket and answer.request.url.path.endswith("/initiate"):
                tickets.append(ticket[1])
                continue  # it is handed to whom it belongs
            heard.append(f"{answer.status_code} {answer.headers!r} {answer.text}")
    await _broken_stores(folder, monkeypatch)
    assert tickets and len(heard) >= 15 and len(written.lines) >= 20
    told, logged = "\n".join(heard), "\n".join(written.lines)
    for secret in (KEY_SECRET, S3_SECRET, DB_SECRET, private, *tickets):
        assert secret not in told and secret not in logged, secret
    assert URL_SECRET not in logged
    assert leaks([KEY_SECRET, S3_SECRET, DB_SECRET, private, *tickets], [folder]) == []
    for line in written.lines[1::2]:
        json.loads(line)


async def _scenario(
    client: httpx.AsyncClient, place: Place, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.Response]:
    alice = {"authorization": f"Key alice:{KEY_SECRET}"}
    source = f"https://user:{URL_SECRET}@example.invalid/cat.png?token={URL_SECRET}"
    yield await client.get("/v1/models/requests", headers=alice)
    yield await client.get("/v1/models/requests", headers={"authorization": f"Bearer {KEY_SECRET}"})
    yield await client.get("/v1/models/requests", headers={"authorization": f"Key mallory:{KEY_SECRET}"})
    yield await client.get("/v1/models/requests", params={"key": KEY_SECRET}, headers=alice)
    yield await client.post("/nowhere", headers=alice, json={})
    yield await client.post(f"/queue/{ENDPOINT}", headers=alice, content=b"{")
    begun = await client.post("/rest/storage/upload/initiate", headers=alice, json={"content_type": "a/b"})
    yield begun
    url = begun.json()["upload_url"]
    yield await client.put(url, content=b"x", headers={"content-type": "b/c"})  # refused
    yield await client.put(url, content=b"x", headers={"content-type": "a/b"})
    yield await client.put(f"{url}x", content=b"x", headers={"content-type": "a/b"})  # changed
    for outcome in (
        InternalError("The model failed."),
        WorkerLost("The worker died."),
        None,
    ):
        place.model.outcome = _ending(outcome)
        yield await client.post(f"/run/{ENDPOINT}", headers=alice, json={"prompt": "x", "num_images": 1})
        yield await client.post(
            f"/run/{PICTURE}", headers=alice, json={"prompt": "x", "image_url": source, "loras": []}
        )
    place.model.failures.append(WorkerLost(f"died on {source}"))
    yield await client.post(
        f"/run/{PICTURE}", headers={**alice, "x-fal-no-retry": "1"}, json={"prompt": "x", "image_url": source}
    )
    webhook = {"fal_webhook": f"https://user:{URL_SECRET}@example.invalid/?token={URL_SECRET}"}
    yield await client.post(f"/queue/{ENDPOINT}", params=webhook, headers=alice, json={"prompt": "x"})

    async def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"unexpected, with Key alice:{KEY_SECRET}, {source} and {url}")

    monkeypatch.setattr(place.gateway, "submit", fails)
    yield await client.post(f"/queue/{ENDPOINT}", headers=alice, json={"prompt": "x"})
    monkeypatch.setattr(place.gateway.uploads, "receive", fails)
    yield await client.put(url, content=b"y", headers={"content-type": "a/b"})


def _ending(error: InternalError | WorkerLost | None) -> Callable[[Job], JobResult]:
    def outcome(job: Job) -> JobResult:
        return JobResult.failure(error or InternalError("The model failed."))

    return outcome


async def _broken_stores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database and a bucket that cannot be reached, whose URLs and environment have secrets."""
    queue = None
    with pytest.raises(StoreDown) as failed:
        queue = open_queue(f"postgresql://me:{DB_SECRET}@127.0.0.1:1/x?connect_timeout=1", LeaseSettings())
        await queue.get("x", "y")
    logging.getLogger("deployments").error("no queue", exc_info=failed.value)
    assert DB_SECRET not in str(failed.value)
    if queue is not None:
        await queue.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    with pytest.raises(ValueError) as refused:
        open_files(f"s3://me:{S3_SECRET}@bucket/x")
    assert S3_SECRET not in str(refused.value)
