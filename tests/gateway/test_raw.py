"""Bytes on a socket that no HTTP client sends: what holds, lies, splits and smuggles."""

import asyncio
import contextlib
import json
import re
import resource
from collections.abc import AsyncIterator
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from schemas.errors import RequestNotFound
from tests.gateway.conftest import ALICE
from tests.support.gateway import Place, gateway_at_work
from tests.support.jobs import ENDPOINT

KEY = f"authorization: Key {ALICE}\r\n"
MAX_BODY_BYTES = 100_000
SLOW_SOCKETS = 300


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    """As elsewhere, but small and impatient."""
    limits: dict[str, Any] = {
        "max_body_bytes": MAX_BODY_BYTES,
        "max_upload_bytes": MAX_BODY_BYTES,
        "body_grace_s": 1,
    }
    async with gateway_at_work(tmp_path, keys=ALICE, **limits) as place:
        place.model.open.set()
        yield place


@contextlib.asynccontextmanager
async def connected(place: Place) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    where = urlsplit(place.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def exchange(place: Place, data: bytes, patience_s: float | None = None) -> bytes:
    """All that the server says until it hangs up. With `patience_s` the sender is first to end: once there is
    an answer, or none for so long; a server that still works on one would drop it."""
    said = b""
    async with connected(place) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            if patience_s is not None:
                with contextlib.suppress(TimeoutError):
                    said = await asyncio.wait_for(reader.read(2**16), patience_s)
                writer.write_eof()
            said += await asyncio.wait_for(reader.read(), 30)
    return said


def statuses(said: bytes) -> list[int]:
    """The statuses of the answers in what a server said."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]


# -- 18: what holds connections


async def test_t18_slow_bodies_are_given_up_and_nobody_else_waits(
    place: Place, alice: httpx.AsyncClient
) -> None:
    head = f"POST /queue/{ENDPOINT} HTTP/1.1\r\nhost: box\r\n{KEY}".encode()
    slow = [head + b"content-length: 100\r\n\r\n{", head + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"]
    async with contextlib.AsyncExitStack() as stack:
        held = []
        for number in range(SLOW_SOCKETS):
            reader, writer = await stack.enter_async_context(connected(place))
            writer.write(slow[number % 2])
            held.append(reader)
        for _ in range(20):  # a caller like any other meanwhile
            assert (await alice.post(f"/run/{ENDPOINT}", json={"prompt": "a cat"})).status_code == 200
        answers = await asyncio.gather(*(asyncio.wait_for(reader.readline(), 60) for reader in held))
    assert {answer.split()[1] for answer in answers} == {b"408"}


async def test_t18_a_slow_reader_of_a_result_holds_nobody_up(place: Place, alice: httpx.AsyncClient) -> None:
    key = await place.files.save(b"x" * 20_000_000, "image/png")
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(50):
            _, writer = await stack.enter_async_context(connected(place))
            writer.write(f"GET /files/{key} HTTP/1.1\r\nhost: box\r\n\r\n".encode())
        for _ in range(20):
            assert (await alice.get("/health")).status_code == 200
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB: nothing was read ahead


# -- 19: what lies about its length


@pytest.mark.parametrize("path", [f"/queue/{ENDPOINT}", f"/run/{ENDPOINT}", "/cdn/files/upload"])
@pytest.mark.parametrize("length", [MAX_BODY_BYTES + 1, 107_374_182_400, 10**30])
async def test_t19_a_length_over_the_limit_is_refused_before_the_body_comes(
    path: str, length: int, place: Place
) -> None:
    async with connected(place) as (reader, writer):
        writer.write(f"POST {path} HTTP/1.1\r\nhost: box\r\n{KEY}content-length: {length}\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.readline(), 30)
    assert answer.split()[1] in ((b"400",) if length == 10**30 else (b"413",))


@pytest.mark.parametrize("path", [f"/queue/{ENDPOINT}", "/cdn/files/upload", "/v1/images/edits"])
async def test_t19_chunks_without_end_are_counted(path: str, place: Place) -> None:
    """The server stops reading: what it has taken is what sockets hold, not what was meant to be sent."""
    async with connected(place) as (reader, writer):
        kind = "multipart/form-data; boundary=b" if "edits" in path else "application/json"
        head = f"POST {path} HTTP/1.1\r\nhost: box\r\n{KEY}content-type: {kind}\r\n"
        writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        if "edits" in path:
            part = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
        chunk, sent = b"2000\r\n" + b"x" * 0x2000 + b"\r\n", 0
        answer = asyncio.ensure_future(reader.readline())
        with contextlib.suppress(ConnectionError):
            while not answer.done() and sent < 200 * MAX_BODY_BYTES:
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(0)  # lets the answer in
                sent += len(chunk)
        assert (await answer).split()[1] in (b"413", b"400")
    assert sent < 200 * MAX_BODY_BYTES
    assert not [each for each in place.gateway.files.place.path.rglob("uploads/*/*") if each.is_file()]  # type: ignore[attr-defined]


async def test_t19_a_form_of_very_many_parts_is_refused(place: Place, alice: httpx.AsyncClient) -> None:
    part = b'--b\r\ncontent-disposition: form-data; name="n"\r\n\r\n1\r\n'
    for count in (2_000, 1_000_000 // len(part)):
        body = part * count + b"--b--\r\n"
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = await alice.post("/v1/images/edits", content=body, headers=headers)
        assert answer.status_code in (400, 413)


# -- 20: what would split an answer

BREAKS = [
    "a\r\nx-evil: 1",
    "a\nx-evil: 1",
    "a\rx-evil: 1",
    "a\r\n\r\nHTTP/1.1 200 OK\r\n",
    "a\x00b",
    "a\r\n x-evil: 1",  # obs-fold
    "a\x80\r\nx-evil: 1",
    "a\u010d\u010ax-evil: 1",  # whose low bytes are CR and LF
    "a%0d%0ax-evil: 1",
    "a\x0b\x0cx-evil: 1",
    "a\u2028x-evil: 1",
]


@pytest.mark.parametrize("text", BREAKS)
async def test_t20_no_word_of_a_caller_s_splits_an_answer(text: str, alice: httpx.AsyncClient) -> None:
    """File names, types, fields, prompts, addresses, webhooks: in bodies and queries."""
    asked = [
        await alice.post("/rest/storage/upload/initiate", json={"file_name": text, "content_type": "a/b"}),
        await alice.post("/rest/storage/upload/initiate", json={"content_type": f"image/png; x={text}"}),
        await alice.post(f"/queue/{ENDPOINT}", json={"prompt": "x", text: 1}),  # named in a header
        await alice.post(
            f"/queue/{ENDPOINT}", params={"fal_webhook": f"https://x.example/{text}"}, json={"prompt": "x"}
        ),  # fmt: skip
        await alice.get(f"/queue/{ENDPOINT}/requests/{'0' * 8}/status", params={"logs": text}),
        await alice.post("/rest/tokens/", json={"app": text, "allowed_apps": [text], "duration": 1}),
        await alice.post("/v1/images/generations", json={"model": text, "prompt": text}),
    ]
    begun = asked[0]
    if begun.status_code == 200:
        sent = await alice.put(begun.json()["upload_url"], content=b"x", headers={"content-type": "a/b"})
        asked += [sent, await alice.get(begun.json()["file_url"])]
    for answer in asked:
        assert answer.status_code < 500
        assert "x-evil" not in answer.headers
        assert all(value.isprintable() for value in answer.headers.values())


RAW_HEADERS = [
    "authorization",
    "host",
    "x-forwarded-host",
    "x-fal-file-name",
    "content-type",
    "idempotency-key",
    "x-fal-request-id",
    "x-fal-target-url",
    "origin",
    "access-control-request-headers",
]


VALUES = [b"a\x00b", b"a\x80b", b"a\rx-evil: 1", b"a\x0bb", b"a\r\n x-evil: 1", b"a\x7fb"]


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
async def test_t20_no_header_splits_an_answer(method: str, place: Place) -> None:
    head = f"{method} /queue/{ENDPOINT} HTTP/1.1\r\nhost: box\r\n{KEY}content-length: 0\r\n".encode()
    for name, value in product(RAW_HEADERS, VALUES):
        said = await exchange(place, head + name.encode() + b": " + value + b"\r\nconnection: close\r\n\r\n")
        assert len(statuses(said)) == 1 and statuses(said)[0] in (200, 204, 400, 401, 422), (name, value)
        lines = said.split(b"\r\n\r\n")[0].split(b"\r\n")
        assert not [line for line in lines if line.lower().startswith(b"x-evil")]
        assert all(b"\n" not in line and b"\r" not in line and b"\0" not in line for line in lines)


# -- 21: what two servers in a row would read differently

SMUGGLED_ID = "5a7d6f0e-0000-4000-8000-000000000000"
INNER = f"DELETE /v1/models/requests/{SMUGGLED_ID}/payloads HTTP/1.1\r\nhost: box\r\n{KEY}x: ".encode()
POST = f"POST /rest/storage/auth/token HTTP/1.1\r\nhost: box\r\n{KEY}".encode()
SMUGGLED = [
    POST + b"content-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,  # CL.TE
    POST
    + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n5c\r\n"
    + INNER
    + b"\r\n0\r\n\r\n",  # TE.CL
    POST + b"content-length: 2\r\ncontent-length: 200\r\n\r\n{}" + INNER,
    POST + b"content-length: 2, 200\r\n\r\n{}" + INNER,
    POST + b"content-length: +2\r\n\r\n{}" + INNER,
    POST + b"content-length: -2\r\n\r\n{}" + INNER,
    POST + b"content-length: 0x2\r\n\r\n{}" + INNER,
    POST + b"content-length: 2 2\r\n\r\n{}" + INNER,
    POST + "content-length: ２\r\n\r\n{}".encode() + INNER,
    POST + b"content-length : 2\r\n\r\n{}" + INNER,
    POST + b"content-length\x00: 2\r\n\r\n{}" + INNER,
    POST + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n" + INNER,
    POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + INNER,
    POST + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n" + INNER,
    POST + b"transfer-encoding: identity\r\ncontent-length: 2\r\n\r\n{}" + INNER,
    POST + b"transfer-encoding: chunked\r\ntransfer-encoding: x\r\n\r\n0\r\n\r\n" + INNER,
    POST + b"transfer-encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + INNER,
    POST + b"transfer-encoding: chunked\r\n\r\n0_0\r\n\r\n" + INNER,
    POST + b"transfer-encoding: chunked\r\n\r\n-1\r\n\r\n" + INNER,
    POST + b"transfer-encoding: chunked\r\n\r\n0x0\r\n\r\n" + INNER,
    POST + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff0\r\n\r\n" + INNER,
    POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}xx\r\n0\r\n\r\n" + INNER,  # longer than it says
    POST + b"transfer-encoding: chunked\r\n\r\n0;a=\nb\r\n\r\n" + INNER,  # LF in an extension
    POST + b"transfer-encoding: chunked\r\n\r\n0\n\n" + INNER,  # bare LF
    POST.replace(b"\r\n", b"\n") + b"content-length: 2\n\n{}" + INNER.replace(b"\r\n", b"\n"),
    POST + b"x: y\r\n content-length: 200\r\ncontent-length: 2\r\n\r\n{}" + INNER,  # obs-fold
    POST + b"\rcontent-length: 200\r\ncontent-length: 2\r\n\r\n{}" + INNER,
    b" " + POST + b"content-length: 2\r\n\r\n{}" + INNER,
    POST.replace(b" HTTP/1.1", b" HTTP/1.1 HTTP/1.1") + b"content-length: 2\r\n\r\n{}" + INNER,
    POST.replace(b"HTTP/1.1", b"HTTP/0.9") + b"content-length: 2\r\n\r\n{}" + INNER,
]


async def test_t21_a_body_is_never_read_as_a_request(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either the first request is refused and the connection closed, or what follows it is no request."""
    smuggled: list[str] = []

    async def erase(request_id: str, tenant: str) -> None:
        smuggled.append(request_id)
        raise RequestNotFound("none")

    monkeypatch.setattr(place.gateway, "erase", erase)
    assert len(SMUGGLED) >= 20
    for sequence in SMUGGLED:
        said = await exchange(place, sequence + b"y\r\n\r\n", patience_s=1)
        assert smuggled == [], (sequence, statuses(said))
        assert statuses(said) in ([], [400], [200], [200, 400], [505]), (sequence, statuses(said))


async def test_the_inner_request_would_be_seen(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def erase(request_id: str, tenant: str) -> None:
        seen.append(request_id)
        raise RequestNotFound("none")

    monkeypatch.setattr(place.gateway, "erase", erase)
    last = INNER + b"y\r\nconnection: close\r\n\r\n"
    said = await exchange(place, POST + b"content-length: 2\r\n\r\n{}" + last)
    assert seen == [SMUGGLED_ID] and statuses(said) == [200, 404]
    assert json.loads(said.split(b"\r\n\r\n")[1].split(b"HTTP/1.1")[0])["token"]
