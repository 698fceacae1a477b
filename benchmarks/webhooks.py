"""Webhooks from the commit that owes them to the answer that is written down, beside bare signed POSTs.

The receivers run in a process of their own and answer at once; the sender has a process to itself, as its
event loop has in the server, and CPU-ms are its own.
"""

import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.measure import Row, arguments, header, show
from deployments.files.egress import Egress
from deployments.queue import Outbox, Queue
from deployments.queue.sqlite import SqliteDatabase
from deployments.webhooks import message
from deployments.webhooks.keyring import Keyring
from deployments.webhooks.sender import Sender
from schemas.deliveries import DeliveryState
from schemas.jobs import JobResult
from schemas.settings import LeaseSettings, WebhookSettings
from tests.support.jobs import OUTPUT, make_job

REPEATS, COUNT, HOSTS = 3, 1000, 32
HERE = WebhookSettings(allowed_networks=("127.0.0.0/8",), allowed_ports=())
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


@dataclass(frozen=True)
class Measured:
    per_s: float
    cpu_ms: float  # each


def _receive(port: "multiprocessing.connection.Connection") -> None:
    """Takes every POST, on every address of the loopback network: each is a host."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        writer.write(ANSWER)
        await writer.drain()
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "0.0.0.0", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


@contextmanager
def receiving() -> Iterator[list[str]]:
    """The URLs of receivers on as many hosts."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_receive, args=(theirs,), daemon=True)
    process.start()
    port = ours.recv()
    yield [f"http://127.0.0.{number}:{port}/hook" for number in range(1, HOSTS + 1)]
    process.kill()
    process.join()


async def deliver(folder: Path, urls: list[str]) -> Measured:
    """Webhooks that are owed when the sender starts."""
    database = SqliteDatabase(folder / "queue.sqlite3")
    queue = Queue(database, LeaseSettings(lease_s=3600))
    outbox = Outbox(database, HERE.lease_s)
    await asyncio.gather(
        *(queue.submit(make_job(webhook_url=urls[number % len(urls)])) for number in range(COUNT))
    )
    claims = await queue.claim("flux", "one", COUNT)
    await asyncio.gather(*(queue.finish(claim, JobResult.success(OUTPUT, 0.5)) for claim in claims))
    sender = Sender(outbox, Egress(HERE), Keyring(folder / "keys", HERE.key_overlap_s), HERE)
    began, cpu = time.perf_counter(), time.process_time()
    sender.start()
    while await outbox.due_hosts():
        await asyncio.sleep(0.1)
    await sender.idle()
    measured = _measured(time.perf_counter() - began, time.process_time() - cpu)
    assert len(await outbox.newest(COUNT, DeliveryState.DELIVERED)) == COUNT
    await sender.close()
    await queue.close()
    return measured


async def post(folder: Path, urls: list[str]) -> Measured:
    """The same bodies, signed and posted by as many tasks as the sender has, with nothing kept."""
    keyring = Keyring(folder / "keys", HERE.key_overlap_s)
    keyring.jwks()
    left = iter(range(COUNT))
    began, cpu = time.perf_counter(), time.process_time()

    async def worker() -> None:
        for number in left:
            content = message.body(str(number), 200, OUTPUT)
            headers = message.headers(keyring.sign, str(number), "public", time.time(), content)
            async with httpx.AsyncClient(verify=tls, trust_env=False) as client:
                answer = await client.post(urls[number % len(urls)], content=content, headers=headers)
                answer.raise_for_status()

    tls = httpx.create_ssl_context()
    await asyncio.gather(*(worker() for _ in range(HERE.concurrency)))
    return _measured(time.perf_counter() - began, time.process_time() - cpu)


def _measured(seconds: float, cpu_s: float) -> Measured:
    return Measured(COUNT / seconds, 1e3 * cpu_s / COUNT)


def measure(folder: Path) -> list[Row]:
    ways = {
        f"bare httpx POSTs, signed, {HERE.concurrency} at once": post,
        f"deliveries to {HOSTS} hosts, durable, logged": deliver,
    }
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    with receiving() as urls:
        for _ in range(REPEATS):
            for name, way in ways.items():
                with tempfile.TemporaryDirectory(dir=folder) as data:
                    found[name].append(asyncio.run(way(Path(data), urls)))
        with tempfile.TemporaryDirectory(dir=folder) as data:
            alone = asyncio.run(deliver(Path(data), urls[:1]))
            found[f"the same to one host, {HERE.per_host} at once"] = [alone]
    return [
        {
            "operation": name,
            "per s": [each.per_s for each in measured],
            "CPU-ms each": [each.cpu_ms for each in measured],
        }
        for name, measured in found.items()
    ]


def main() -> None:
    options = arguments("Rates of webhook deliveries.")
    options.dir.mkdir(parents=True, exist_ok=True)
    caption = f"{COUNT} each; median (range) of {REPEATS} interleaved repeats; CPU-ms: the sender's process"
    show("webhooks: deliveries over plain HTTP", measure(options.dir), caption, options.json)


if __name__ == "__main__":
    header()
    main()
