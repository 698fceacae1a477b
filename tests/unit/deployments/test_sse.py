"""Server-sent events: frames, and what happens when the reader leaves."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.types import Message

from deployments.gateway import sse
from deployments.gateway.sse import EventStream

SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}


async def documents(*values: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    for value in values:
        yield value


async def connected() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def disconnected() -> Message:
    return {"type": "http.disconnect"}


async def test_each_document_is_an_event_and_the_end_is_told() -> None:
    sent: list[Message] = []
    closed: list[bool] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await EventStream(documents({"a": 1}, {"b": "ü"}), {}, lambda: closed.append(True))(
        SCOPE, connected, send
    )
    body = b"".join(message.get("body", b"") for message in sent)
    assert body == b'data: {"a":1}\n\ndata: {"b":"\\u00fc"}\n\n'
    assert closed == [True]


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_a_reader_that_left_before_the_first_byte_is_noticed(spec_version: str) -> None:
    closed: list[bool] = []

    async def send(message: Message) -> None:
        raise OSError("gone")

    stream = EventStream(documents({"a": 1}), {}, lambda: closed.append(True))
    scope = {"type": "http", "asgi": {"spec_version": spec_version}}
    with pytest.raises(BaseException):  # noqa: B017 - which one is the server's affair
        await stream(scope, disconnected, send)
    assert closed == [True]


async def test_a_stream_without_events_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 * sse.PING_S <= 10  # OkHttp's patience
    monkeypatch.setattr(sse, "PING_S", 0.01)
    pinged = asyncio.Event()

    async def late() -> AsyncIterator[dict[str, Any]]:
        await pinged.wait()
        yield {"a": 1}

    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))
        if sent[-1] == b": ping\n\n":
            pinged.set()

    await EventStream(late(), {})(SCOPE, connected, send)
    assert sent[-2] == b'data: {"a":1}\n\n' and b": ping\n\n" in sent
