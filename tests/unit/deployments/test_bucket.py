"""The file store in a bucket: a real server that speaks S3, clients that know nothing of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import obstore
import pytest
from starlette.routing import Router

from deployments.files.store import FileStore, open_files
from deployments.files.sweeper import Sweeper
from deployments.files.uploads import SLACK_S, TICKET_S, Uploads
from deployments.gateway import downloads, middleware
from schemas.errors import BadRequest, BodyTooLarge, Forbidden, StoreDown
from tests.support.buckets import CREDENTIALS, files_url, s3_at_work
from tests.support.server import free_port
from tests.support.uploading import Clock, begun, parted, sent, uploaded

LIMIT = 20_000_000


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_at_work() as address:
        yield address


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def url(s3: str) -> str:
    return files_url(s3, f"b{uuid4().hex}")


@pytest.fixture
def files(url: str, clock: Clock) -> FileStore:
    return open_files(url, clock)


@pytest.fixture
def uploads(files: FileStore) -> Uploads:
    return Uploads(files, LIMIT)


def client_of(files: FileStore) -> httpx.AsyncClient:
    """Of a server with these files. What it is redirected to is asked for over the network."""
    app = middleware.Headers(middleware.Errors(Router(downloads.routes(files))))
    here = {"all://box": httpx.ASGITransport(app)}
    return httpx.AsyncClient(mounts=here, base_url="http://box/files/", follow_redirects=True)


@pytest.fixture
async def http(files: FileStore) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(files) as client:
        yield client


async def content(files: FileStore, key: str) -> bytes:
    found = await files.open(key)
    assert found is not None
    return b"".join([chunk async for chunk in found.chunks])


async def kept(files: FileStore) -> set[str]:
    batches = [batch async for batch in obstore.list(files.objects)]
    return {each["path"] for batch in batches for each in batch} - {"secret"}


def unfinished(s3: str, files: FileStore) -> str:
    """What S3 says of parts that belong to no object."""
    bucket = files.place.url("").removeprefix("s3://").split("/")[0]
    return httpx.get(f"{s3}/{bucket}?uploads").text


# -- what is sent


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20, 12_000_000])
async def test_a_file_is_what_was_sent(size: int, uploads: Uploads, files: FileStore) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    ticket = await uploaded(uploads, data[:size])
    assert await content(files, ticket.key) == data[:size]
    assert await kept(files) == {ticket.key, f"details/{ticket.key}"}


async def test_parts_may_come_in_any_order_and_again(uploads: Uploads, files: FileStore) -> None:
    ticket = await begun(uploads)
    one, three, two = b"1" * 6_000_000, b"3", b"2" * 100
    tags = await parted(uploads, ticket, {3: three, 1: b"x", 2: two})
    tags |= await parted(uploads, ticket, {1: one})
    with pytest.raises(BadRequest, match="Part 2 is missing"):
        await uploads.complete(ticket, {1: tags[1], 3: tags[3]})
    for _ in range(2):
        await uploads.complete(ticket, tags)
    assert await content(files, ticket.key) == one + two + three
    assert await kept(files) == {ticket.key, f"details/{ticket.key}"}
    with pytest.raises(Forbidden, match="another content"):
        await uploads.complete(ticket, await parted(uploads, ticket, {1: b"other"}))


async def test_of_two_contents_at_once_one_wins_whole(uploads: Uploads, files: FileStore) -> None:
    ticket = await begun(uploads)

    async def send(data: bytes) -> bytes | None:
        tag = await uploads.receive(ticket, 1, sent(data))
        try:
            await uploads.complete(ticket, {1: tag})
        except (Forbidden, BadRequest):
            return None
        return data

    won = [data for data in await asyncio.gather(send(b"a" * 100), send(b"b" * 100)) if data]
    assert [await content(files, ticket.key)] == won


async def test_what_breaks_or_is_too_large_leaves_nothing(
    s3: str, uploads: Uploads, files: FileStore
) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield b"x" * 11_000_000
        raise ConnectionError

    ticket = await begun(uploads)
    with pytest.raises(ConnectionError):
        await uploads.receive(ticket, 1, breaking())
    with pytest.raises(BodyTooLarge):
        await uploads.receive(ticket, 1, sent(b"x" * (LIMIT + 1), 1_000_000))
    assert await kept(files) == set()
    assert "<Upload>" not in unfinished(s3, files)


async def test_any_process_with_the_same_store_takes_a_ticket(uploads: Uploads, url: str) -> None:
    ticket = await begun(uploads)
    other = Uploads(open_files(url), LIMIT)
    assert other.ticket(uploads.sign(ticket), ticket.key) == ticket


# -- what is read


async def test_a_client_reads_a_file_from_the_bucket(http: httpx.AsyncClient, files: FileStore) -> None:
    key = await files.save(b"0123456789", "image/png")
    answer = await http.get(key)
    assert answer.content == b"0123456789"
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == "inline"
    [redirect] = answer.history
    assert redirect.status_code == 302
    assert redirect.headers["cache-control"] == "private, max-age=1800"
    assert redirect.headers["access-control-allow-origin"] == "*"
    part = await http.get(key, headers={"range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    head = await http.head(key)
    assert (head.headers["content-length"], head.history) == ("10", [])


@pytest.mark.parametrize(("kind", "shown"), [("image/png", "inline"), ("text/html", "attachment")])
async def test_the_bucket_shows_but_never_runs_what_a_client_sent(
    kind: str, shown: str, http: httpx.AsyncClient, uploads: Uploads
) -> None:
    for data in ({1: b"x"}, {1: b"x", 2: b"y"}):  # renamed, and joined
        ticket = await uploads.begin("cat.png", kind, None)
        await uploads.complete(ticket, await parted(uploads, ticket, data))
        answer = await http.get(ticket.key)
        assert answer.content == b"".join(data.values())
        assert answer.headers["content-type"] == kind
        assert answer.headers["content-disposition"] == f'{shown}; filename="cat.png"'


async def test_a_signature_is_for_one_file_and_a_while(
    http: httpx.AsyncClient, files: FileStore, clock: Clock
) -> None:
    key = await files.save(b"x", "image/png", 60)
    [redirect] = (await http.get(key)).history
    target = httpx.URL(redirect.headers["location"])
    assert 57 <= int(target.params["X-Amz-Expires"]) <= 60
    assert "s3cret" not in str(target)
    clock.ahead = 61
    assert (await http.get(key)).status_code == 404
    assert (await http.get(f"{'0' * 32}.png")).status_code == 404


async def test_files_may_be_handed_out_by_the_server(s3: str) -> None:
    files = open_files(files_url(s3, f"b{uuid4().hex}", "&presigned_s=0"))
    key = await files.save(b"0123456789", "image/png")
    async with client_of(files) as http:
        whole, part = await http.get(key), await http.get(key, headers={"range": "bytes=2-4"})
    assert (whole.content, part.content) == (b"0123456789", b"234")
    assert (whole.history, whole.headers["etag"]) == ([], f'"{key[:32]}"')


async def test_clients_may_know_the_store_by_another_name(s3: str) -> None:
    files = open_files(files_url(s3, f"b{uuid4().hex}", "&public_endpoint=https://cdn.example"))
    key = await files.save(b"x", "image/png")
    place = await files.redirect(key)
    assert place is not None and place.url.startswith("https://cdn.example/b")


# -- what is removed


async def test_what_is_over_and_what_was_given_up_is_removed(
    uploads: Uploads, files: FileStore, clock: Clock
) -> None:
    short, long, output = (
        await uploaded(uploads, keep_s=60),
        await uploaded(uploads),
        await files.save(b"x", "image/png", 60),
    )
    left = await begun(uploads)
    await parted(uploads, left, {1: b"x", 2: b"y"})
    sweeper = Sweeper(files, 3600)
    assert await sweeper.sweep() == 0
    clock.ahead = 61
    assert await files.open(short.key) is None and await files.open(output) is None
    assert await sweeper.sweep() == 2
    assert await sweeper.sweep() == 0
    assert not {short.key, output} & await kept(files)
    assert len([name for name in await kept(files) if name.startswith("uploads/")]) == 2
    clock.ahead = TICKET_S + SLACK_S + 61
    await sweeper.sweep()
    assert await kept(files) == {long.key, f"details/{long.key}"}


# -- what is refused


async def test_a_store_that_does_not_answer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_files(f"s3://bucket?endpoint=http://127.0.0.1:{free_port()}")
    uploads = Uploads(files, LIMIT)
    began = time.monotonic()
    with pytest.raises(StoreDown, match="try again"):
        await files.save(b"x", "image/png")
    with pytest.raises(StoreDown, match="try again"):
        uploads.sign(await begun(uploads))
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://", "s3://BUCKET"),
        ("s3://key:secret@bucket", "environment only"),
        ("s3://bucket?access_key_id=x", "access_key_id"),
        ("s3://bucket?presigned_s=soon", "presigned_s"),
        ("s3://bucket?presigned_s=604801", "presigned_s"),
        ("s3://bucket?endpoint=localhost:9000", "endpoint"),
        ("gs://bucket", "must begin with"),
    ],
)
def test_a_url_that_names_no_bucket_is_refused(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        open_files(url)
    assert "secret" not in str(caught.value)


def test_a_bucket_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    open_files(url)
    assert list(tmp_path.iterdir()) == []
