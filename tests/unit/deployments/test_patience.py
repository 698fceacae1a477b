"""Bodies that come slowly, on a loop whose time is real but short."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from deployments.gateway.patience import Patience
from schemas.errors import TooSlow

GRACE_S = 0.05


async def read(chunks: AsyncIterator[bytes], bytes_per_s: float = 10, work_s: float = 0) -> bytes:
    """The body as an application behind the middleware sees it."""
    found = b""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal found
        async for chunk in Request(scope, receive).stream():
            found += chunk
            await asyncio.sleep(work_s)
        assert (await receive())["type"] == "http.disconnect"

    async def receive() -> Message:
        chunk = await anext(chunks, None)
        if chunk is None:
            await asyncio.sleep(2 * GRACE_S)  # for its answer a caller may wait
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk, "more_body": chunk != b""}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope: dict[str, Any] = {"type": "http", "method": "PUT", "headers": []}
    await Patience(app, GRACE_S, bytes_per_s)(scope, receive, send)
    return found


async def body(*chunks: bytes, wait_s: float = 0) -> AsyncIterator[bytes]:
    for chunk in (*chunks, b""):
        await asyncio.sleep(wait_s)
        yield chunk


async def test_what_comes_at_once_is_read() -> None:
    assert await read(body(b"one", b"two")) == b"onetwo"


@pytest.mark.parametrize("chunks", [[b""], [b"x"], [b"x"] * 100])
async def test_t18_what_drips_is_given_up(chunks: list[bytes]) -> None:
    with pytest.raises(TooSlow):
        await asyncio.wait_for(read(body(*chunks, wait_s=2 * GRACE_S), bytes_per_s=1_000_000), 5)


async def test_many_small_waits_add_up() -> None:
    with pytest.raises(TooSlow):
        await read(body(*[b"x"] * 100, wait_s=GRACE_S / 5), bytes_per_s=1_000_000)


async def test_every_byte_earns_time() -> None:
    data = [b"x" * 10] * 10  # a second each
    assert await read(body(*data, wait_s=GRACE_S / 5)) == b"".join(data)


async def test_what_the_server_does_with_the_bytes_does_not_count() -> None:
    assert await read(body(b"x", b"y"), bytes_per_s=1_000_000, work_s=2 * GRACE_S) == b"xy"
