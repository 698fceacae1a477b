"""A CONNECT proxy on this machine that is fal to its clients: what they send to fal goes to a server of ours.

It answers for fal's host names with a certificate of the user's own authority, and refuses all others, so
that nothing leaves by mistake.
"""

import asyncio
import logging
import re
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h11

from deployments.connect.authority import Authority
from deployments.connect.hosts import PREFIXES, Server, is_fals
from deployments.connect.relay import dial, given_back, pipe, relay, until_one_ends

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
HEAD_S = 10.0
_CONNECT = re.compile(rb"CONNECT ([\w.-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5}) HTTP/1\.[01]\r\n")


class Listener:
    """Takes connections to fal's hosts to `server`. With `passes_through`, tunnels to hosts of others."""

    def __init__(self, server: Server, authority: Authority, *, passes_through: bool) -> None:
        self._server = server
        self._context = authority.context()
        self._trust = ssl.create_default_context() if server.is_tls else None
        self._passes_through = passes_through

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[int]:
        """Listen on this machine's loopback, for callers that are on it. Yields the port. Raises OSError."""
        listener = await asyncio.start_server(self._serve, LOOPBACK, port)
        try:
            taken: int = listener.sockets[0].getsockname()[1]
            yield taken
        finally:
            listener.close()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        async with given_back(writer):
            async with asyncio.timeout(HEAD_S):
                head = await reader.readuntil(b"\r\n\r\n")
            await self._answer(head, reader, writer)

    async def _answer(self, head: bytes, reader: StreamReader, writer: StreamWriter) -> None:
        match = _CONNECT.match(head)
        if match is None:
            await _refuse(writer, "405 Method Not Allowed", "Only CONNECT is served here.")
            return
        host, port = match[1].decode().strip("[]").lower(), int(match[2])
        if host in PREFIXES and port == 443:
            await self._be(host, reader, writer)
        elif self._passes_through and not is_fals(host):
            await _tunnel(host, port, reader, writer)
        else:
            logger.warning("refused a connection to %s:%s", host, port)
            await _refuse(writer, "403 Forbidden", f"{host}:{port} is not served here.")

    async def _be(self, host: str, reader: StreamReader, writer: StreamWriter) -> None:
        """Answer as the host itself."""
        await _accept(writer)
        await writer.start_tls(self._context, ssl_handshake_timeout=HEAD_S)

        def rewrite(request: h11.Request) -> h11.Request:
            return _addressed(request, PREFIXES[host].encode(), self._server.netloc.encode())

        await relay(reader, writer, self._server, self._trust, rewrite)


async def _tunnel(host: str, port: int, reader: StreamReader, writer: StreamWriter) -> None:
    try:
        from_host, to_host = await dial(host, port, None)
    except OSError as error:
        await _refuse(writer, "502 Bad Gateway", f"{host}:{port} cannot be reached: {error}")
        return
    try:
        await _accept(writer)
        await until_one_ends(pipe(reader, to_host), pipe(from_host, writer))
    finally:
        to_host.close()


async def _accept(writer: StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 Connection Established\r\n\r\n")
    await writer.drain()


async def _refuse(writer: StreamWriter, status: str, why: str) -> None:
    lines = (
        f"HTTP/1.1 {status}",
        f"content-length: {len(why)}",
        "content-type: text/plain",
        "connection: close",
    )
    writer.write("\r\n".join((*lines, "", why)).encode())
    await writer.drain()


def _addressed(request: h11.Request, prefix: bytes, netloc: bytes) -> h11.Request:
    """The same request to our server: URLs in its answer are then our server's own."""
    headers = [(name, value) for name, value in request.headers.raw_items() if name.lower() != b"host"]
    return h11.Request(
        method=request.method,
        target=prefix + request.target,
        headers=[(b"Host", netloc), *headers],
        http_version=request.http_version,
    )
