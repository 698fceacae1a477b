"""TLS in front of the HTTP port: Serve's HAProxy is configured without it."""

import asyncio
import socket
import ssl
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h11

from deployments.connect.hosts import Server
from deployments.connect.relay import given_back, relay

HANDSHAKE_S = 10.0


@contextmanager
def tls_in_front(server: Server, host: str, port: int, certificate: Path, key: Path) -> Iterator[None]:
    """Take TLS at `host` and `port` to the plain server, in a thread. Raises OSError, SSLError included."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    loop, stopped = asyncio.new_event_loop(), asyncio.Event()

    async def listen(door: socket.socket) -> None:
        handler = partial(_serve, server)
        async with await asyncio.start_server(
            handler, sock=door, ssl=context, ssl_handshake_timeout=HANDSHAKE_S
        ):
            await stopped.wait()

    def work(door: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(listen(door))

    with socket.create_server((host, port)) as door:
        thread = threading.Thread(target=work, args=(door,), name="tls")
        thread.start()
        try:
            yield
        finally:
            loop.call_soon_threadsafe(stopped.set)
            thread.join()


async def _serve(server: Server, reader: StreamReader, writer: StreamWriter) -> None:
    async with given_back(writer):
        await relay(reader, writer, server, None, _told_of_tls)


def _told_of_tls(request: h11.Request) -> h11.Request:
    """With the header that makes URLs in the answer https."""
    name = b"x-forwarded-proto"
    headers = [each for each in request.headers.raw_items() if each[0].lower() != name]
    return h11.Request(
        method=request.method,
        target=request.target,
        headers=[*headers, (name, b"https")],
        http_version=request.http_version,
    )
