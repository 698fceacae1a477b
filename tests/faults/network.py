"""A TCP proxy in front of a server's Unix socket that breaks as it is told."""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.processes import void

CHUNK = 65_536


@dataclass
class Network:
    """What it does to connections. It may be told otherwise at any time, from any thread."""

    port: int = 0
    refuses: bool = False  # new connections are reset at once
    is_stalled: bool = False  # nothing goes through; connections stay
    budget: int | None = None  # bytes, of both directions, until all connections are reset
    cuts: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def _reset_all(self) -> None:
        """As a firewall does: both sides learn of it at once."""
        self.cuts += 1
        self.budget = None
        for writer in list(self._writers):
            _reset(writer)

    def _take(self, data: bytes) -> bytes:
        """What of it still goes through."""
        if self.budget is None:
            return data
        allowed = data[: self.budget]
        self.budget -= len(allowed)
        return allowed


@contextmanager
def network_to(path: Path) -> Iterator[Network]:
    """A proxy on a port of this machine, with a loop of its own."""
    network, ready = Network(), threading.Event()
    stop: list[Callable[[], None]] = []

    async def serve() -> None:
        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _join(network, path, reader, writer)

        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: void(loop.call_soon_threadsafe(over.set)))
        server = await asyncio.start_server(meet, "127.0.0.1", 0)
        network.port = server.sockets[0].getsockname()[1]
        ready.set()
        await over.wait()
        server.close()
        network._reset_all()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait(10)
    try:
        yield network
    finally:
        stop[0]()
        thread.join(10)


async def _join(
    network: Network, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    if network.refuses:
        _reset(writer)
        return
    try:
        back_reader, back_writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        _reset(writer)
        return
    both = {writer, back_writer}
    network._writers |= both
    pumps = [_pump(network, reader, back_writer), _pump(network, back_reader, writer)]
    await asyncio.wait([asyncio.ensure_future(each) for each in pumps], return_when="FIRST_COMPLETED")
    network._writers -= both
    for each in both:
        each.transport.abort()


async def _pump(network: Network, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            while network.is_stalled:
                await asyncio.sleep(0.01)
            allowed = network._take(data)
            writer.write(allowed)
            await writer.drain()
            if len(allowed) < len(data):
                network._reset_all()
                return


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, so that the other side cannot take it for an end in order."""
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.family == socket.AF_INET:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def anywhere(chance: random.Random) -> int:
    """A number of bytes within a few transactions."""
    return chance.randrange(1, 4000)
