"""Passes the HTTP requests of a connection on to a server with their heads changed, answers as they are."""

import asyncio
import json
import logging
import ssl
from asyncio import IncompleteReadError, LimitOverrunError, StreamReader, StreamWriter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import h11

from deployments.connect.hosts import Server

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 2**10
MAX_HEAD_BYTES = 64 * 2**10
CONNECT_S = 10.0

Rewrite = Callable[[h11.Request], h11.Request]


async def relay(
    reader: StreamReader,
    writer: StreamWriter,
    server: Server,
    trust: ssl.SSLContext | None,
    rewrite: Rewrite,
) -> None:
    """Serve a client's connection until either side ends it. `trust` where the server speaks TLS."""
    try:
        from_server, to_server = await dial(server.host, server.port, trust)
    except OSError as error:
        writer.write(_bad_gateway(f"{server.url} cannot be reached: {error}"))
        await writer.drain()
        return
    try:
        await until_one_ends(_requests(reader, to_server, rewrite), pipe(from_server, writer))
    finally:
        to_server.close()


async def dial(host: str, port: int, trust: ssl.SSLContext | None) -> tuple[StreamReader, StreamWriter]:
    """Raises OSError, TimeoutError included."""
    async with asyncio.timeout(CONNECT_S):
        return await asyncio.open_connection(host, port, ssl=trust)


async def until_one_ends(*ways: Coroutine[Any, Any, None]) -> None:
    """Run both ways of a connection. Where one ends, the other has nobody to talk to."""
    tasks = [asyncio.create_task(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def pipe(reader: StreamReader, writer: StreamWriter) -> None:
    """Bytes as they come, until there are no more."""
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def given_back(writer: StreamWriter) -> AsyncIterator[None]:
    """A connection is closed whatever becomes of it: what is left is sent, unless its listener has ended."""
    try:
        yield
    except (OSError, IncompleteReadError, LimitOverrunError, h11.ProtocolError) as error:
        logger.debug("a connection broke: %r", error)
    except asyncio.CancelledError:
        writer.transport.abort()  # raised further, asyncio's streams would report it as a fault
    finally:
        writer.close()


async def _requests(reader: StreamReader, writer: StreamWriter, rewrite: Rewrite) -> None:
    """Requests one by one; what follows a websocket's is not looked into."""
    rest = b""
    upgrades = False
    while not upgrades:
        read, written = h11.Connection(h11.SERVER, MAX_HEAD_BYTES), h11.Connection(h11.CLIENT)
        if rest:
            read.receive_data(rest)
        while not isinstance(event := read.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                read.receive_data(await reader.read(CHUNK_BYTES))
            elif isinstance(event, h11.Request):
                upgrades = (b"upgrade", b"websocket") in [(k, v.lower()) for k, v in event.headers]
                await _write(writer, written.send(rewrite(event)))
            elif isinstance(event, h11.Data):
                await _write(writer, written.send(event))
            else:
                return  # the client has left
        await _write(writer, written.send(event))
        rest = read.trailing_data[0]
    await _write(writer, rest)
    await pipe(reader, writer)


async def _write(writer: StreamWriter, data: bytes | None) -> None:
    if data:
        writer.write(data)
        await writer.drain()


def _bad_gateway(detail: str) -> bytes:
    body = json.dumps({"detail": detail, "error_type": "bad_gateway", "message": detail}).encode()
    head = (
        f"HTTP/1.1 502 Bad Gateway\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body
