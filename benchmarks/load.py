"""A load of HTTP calls over keep-alive connections, cheap enough not to be what is measured."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Tally:
    """What a load came to."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds, one a call
    bodies: list[bytes] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        return len(self.latencies) / self.seconds


def request(url: str, method: str, path: str, body: bytes = b"") -> bytes:
    """The bytes of an HTTP request."""
    lines = [f"{method} {path} HTTP/1.1", f"host: {urlsplit(url).netloc}", f"content-length: {len(body)}"]
    if body:
        lines.append("content-type: application/json")
    return "\r\n".join([*lines, "", ""]).encode() + body


def drive(
    url: str, connections: int, seconds: float, next_request: Callable[[int], bytes], pause_s: float = 0
) -> Tally:
    """Call from all connections at once, each its next request `pause_s` after its answer.

    `next_request` gets the connection's number. Any answer but a 2xx raises.
    """
    return asyncio.run(_drive(url, connections, seconds, next_request, pause_s))


async def _drive(
    url: str, connections: int, seconds: float, next_request: Callable[[int], bytes], pause_s: float
) -> Tally:
    tally = Tally()
    began = time.perf_counter()
    calls = (
        _call(url, number, began + seconds, next_request, pause_s, tally) for number in range(connections)
    )
    await asyncio.gather(*calls)
    tally.seconds = time.perf_counter() - began
    return tally


async def _call(
    url: str, number: int, until: float, next_request: Callable[[int], bytes], pause_s: float, tally: Tally
) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        while (began := time.perf_counter()) < until:
            writer.write(next_request(number))
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(_length(head))
            if not head.startswith(b"HTTP/1.1 2"):
                raise RuntimeError(f"{head!r} {body!r}")
            tally.latencies.append(time.perf_counter() - began)
            tally.bodies.append(body)
            if pause_s:
                await asyncio.sleep(pause_s)
    finally:
        writer.close()


def _length(head: bytes) -> int:
    return int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
