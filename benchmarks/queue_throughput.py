"""How much the queue bears: durable submits beside the stores' and the disk's own rates, then submits and
polls over HTTP.

The worker process is stopped while HTTP is measured, so that the front alone has the cores and what is
submitted stays queued.
"""

import asyncio
import json
import os
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
from sqlalchemy import Connection

from benchmarks.load import Tally, drive, request
from benchmarks.measure import Row, arguments, cpu_s, header, percentile, serving, show
from deployments.queue import Queue, open_queue, rows
from deployments.queue.statements import ACCEPT
from schemas.jobs import State
from schemas.settings import LeaseSettings
from tests.support.jobs import ENDPOINT, make_job
from tests.support.postgres import PostgresServer, postgres_at_work
from tests.support.server import Server

REPEATS, CALLERS, SECONDS = 3, 32, 4.0
LOOKS, BACKLOG = 300, 100_000
FIELDS = {"prompt": "a lighthouse", "num_inference_steps": 50, "seed": 7}
Measured = tuple[float, float]  # operations a second, CPU-ms each


def disk(folder: Path) -> Measured:
    """4 KiB written and synced at a time into a file that has its size, as a log has that is used again."""
    page, pages = b"x" * 4096, 1024
    (folder / "log").write_bytes(page * pages)
    with (folder / "log").open("r+b", buffering=0) as file:

        def write() -> None:
            if file.tell() == pages * len(page):
                file.seek(0)
            file.write(page)
            os.fdatasync(file.fileno())

        return _repeat(write)


def plain_sqlite(folder: Path) -> Measured:
    """One writer, one insert a commit, as durable as ours."""
    database = sqlite3.connect(folder / "plain.sqlite3", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE requests (seq INTEGER PRIMARY KEY, input TEXT)")
    row = (json.dumps(FIELDS),)
    return _repeat(lambda: database.execute("INSERT INTO requests (input) VALUES (?)", row))


def plain_postgres(url: str, clients: int) -> Measured:
    """One insert a commit, each client on a connection and a thread of its own."""
    row = (json.dumps(FIELDS),)

    def client(_: int) -> int:
        with psycopg.connect(url, autocommit=True) as connection:
            count, began = 0, time.perf_counter()
            while time.perf_counter() - began < SECONDS / 2:
                connection.execute("INSERT INTO plain (input) VALUES (%s)", row)
                count += 1
            return count

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE plain (seq bigserial PRIMARY KEY, input text)")
    began, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(clients) as threads:
        count = sum(threads.map(client, range(clients)))
    return count / (time.perf_counter() - began), 1e3 * (time.process_time() - cpu) / count


def _repeat(operation: Callable[[], object]) -> Measured:
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    while (seconds := time.perf_counter() - began) < SECONDS / 2:
        operation()
        count += 1
    return count / seconds, 1e3 * (time.process_time() - cpu) / count


def submits(url: str, waiting: int = 0) -> Measured:
    """Queue.submit by concurrent callers, with so many requests queued before."""
    return asyncio.run(_submits(url, waiting))


async def _submits(url: str, waiting: int) -> Measured:
    queue = open_queue(url, LeaseSettings())
    for _ in range(0, waiting, 250):
        await asyncio.gather(*(queue.submit(make_job(input=FIELDS)) for _ in range(250)))
    began, cpu = time.perf_counter(), time.process_time()

    async def caller() -> int:
        count = 0
        while time.perf_counter() - began < SECONDS:
            await queue.submit(make_job(input=FIELDS))
            count += 1
        return count

    count = sum(await asyncio.gather(*(caller() for _ in range(CALLERS))))
    seconds, used = time.perf_counter() - began, time.process_time() - cpu
    await queue.close()
    return count / seconds, 1e3 * used / count


def measure_queue(folder: Path) -> list[Row]:
    with postgres_at_work() as server:
        return _measure_queue(folder, server)


def _measure_queue(folder: Path, server: PostgresServer) -> list[Row]:
    def sqlite_queue(data: Path) -> str:
        return f"sqlite:///{data}/queue.sqlite3"

    submit = f"Queue.submit, {CALLERS} callers"
    ways: dict[str, Callable[[Path], Measured]] = {
        "4 KiB written, fdatasync, one thread": disk,
        "sqlite3 WAL+FULL, one insert a commit": plain_sqlite,
        "PostgreSQL, one insert a commit, 1 client": lambda _: plain_postgres(server.new_database(), 1),
        "PostgreSQL, one insert a commit, 8 clients": lambda _: plain_postgres(server.new_database(), 8),
        f"{submit}, empty queue, SQLite": lambda data: submits(sqlite_queue(data)),
        f"{submit}, empty queue, PostgreSQL": lambda _: submits(server.new_database()),
    }
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            with TemporaryDirectory(dir=folder) as data:
                found[name].append(way(Path(data)))
    with TemporaryDirectory(dir=folder) as data:
        found[f"{submit}, 10,000 queued before, SQLite"] = [submits(sqlite_queue(Path(data)), 10_000)]
    found[f"{submit}, 10,000 queued before, PostgreSQL"] = [submits(server.new_database(), 10_000)]
    return [
        {
            "operation": name,
            "per s": [rate for rate, _ in measured],
            "CPU-ms each": [cpu for _, cpu in measured],
            "aim": _verdict(1000, median(rate for rate, _ in measured)) if "empty" in name else "",
        }
        for name, measured in found.items()
    ]


def measure_backlog(folder: Path) -> list[Row]:
    """What a long queue costs those who look at it."""
    with postgres_at_work() as server, TemporaryDirectory(dir=folder) as data:
        stores = {"SQLite": f"sqlite:///{data}/queue.sqlite3", "PostgreSQL": server.new_database()}
        return [row for store, url in stores.items() for row in asyncio.run(_look(store, url))]


async def _look(store: str, url: str) -> list[Row]:
    queue = open_queue(url, LeaseSettings())
    queued = 0
    found: list[Row] = []
    for backlog in (LOOKS, BACKLOG):
        await _fill(queue, backlog - queued)
        last = make_job(input=FIELDS)
        await queue.submit(last)
        claims = [await _ms(queue.claim("flux", "one", 1)) for _ in range(LOOKS)]
        positions = [await _ms(queue.get(last.request_id, last.tenant)) for _ in range(LOOKS)]
        for name, times in (("claim", claims), ("position", positions)):
            p50, p99 = percentile(times, 50), percentile(times, 99)
            found.append({"look": f"{name}, {store}, {backlog:,} queued", "p50 ms": p50, "p99 ms": p99})
        queued = backlog - LOOKS + 1
    await queue.close()
    return found


async def _ms(look: Awaitable[object]) -> float:
    began = time.perf_counter()
    await look
    return 1e3 * (time.perf_counter() - began)


async def _fill(queue: Queue, count: int) -> None:
    """Put requests into the table, a thousand a commit: submits would take minutes."""
    for first in range(0, count, 1000):
        waiting = [
            {
                **rows.job_values(make_job(input=FIELDS)),
                "turn": first + number,
                "state": State.QUEUED,
                "accepted_at": queue.now(),
                "not_before": queue.now(),
                "fence": 0,
                "attempts": 0,
                "crashes": 0,
                "cancel_requested": False,
            }
            for number in range(min(1000, count - first))
        ]
        await queue._database.write(partial(_insert, waiting))


def _insert(waiting: list[dict[str, Any]], connection: Connection) -> None:
    connection.execute(ACCEPT, waiting)


def measure_http(folder: Path) -> list[Row]:
    with postgres_at_work() as server:
        stores: dict[str, dict[str, Any]] = {"SQLite": {}, "PostgreSQL": {"queue_url": server.new_database()}}
        return [row for store, front in stores.items() for row in _measure_http(folder, store, front)]


def _measure_http(folder: Path, store: str, front: dict[str, Any]) -> list[Row]:
    with serving(folder, front) as server, stopped(server):
        submit = request(server.url, "POST", f"/queue/{ENDPOINT}", json.dumps(FIELDS).encode())
        health = request(server.url, "GET", "/health")
        few = drive(server.url, CALLERS, 0.2, lambda _: submit).bodies[-CALLERS:]

        def poll(number: int) -> bytes:
            return request(server.url, "GET", json.loads(few[number])["status_url"].removeprefix(server.url))

        ways: dict[str, Callable[[int], bytes]] = {
            "GET /health: the same path, no work": lambda _: health,
            "status poll of a queued request": poll,
            "durable submit": lambda _: submit,
        }
        tallies: dict[str, list[tuple[Tally, float]]] = {name: [] for name in ways}
        for _ in range(REPEATS):
            for name, way in ways.items():
                cpu = cpu_s(server.pids())
                tally = drive(server.url, CALLERS, SECONDS / 2, way)
                tallies[name].append((tally, 1e3 * (cpu_s(server.pids()) - cpu) / len(tally.latencies)))
    aims = {"status poll of a queued request": 500.0, "durable submit": 300.0}
    return [_row(f"{name}, {store}", measured, aims.get(name)) for name, measured in tallies.items()]


def _row(name: str, measured: list[tuple[Tally, float]], aim: float | None) -> Row:
    rates = [tally.per_s for tally, _ in measured]
    return {
        "call": name,
        "per s": rates,
        "p50 ms": [1e3 * percentile(tally.latencies, 50) for tally, _ in measured],
        "p99 ms": [1e3 * percentile(tally.latencies, 99) for tally, _ in measured],
        "CPU-ms each": [cpu for _, cpu in measured],
        "aim": "" if aim is None else _verdict(aim, median(rates)),
    }


def _verdict(aim: float, rate: float) -> str:
    return f"{aim:,.0f}/s {'met' if rate >= aim else 'missed'}"


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """The worker stands still; not longer than its health checks bear."""
    workers = server.pids("flux:worker")
    assert workers, "the server has no worker"
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)


def main() -> None:
    options = arguments("Rates of the durable queue.")
    options.dir.mkdir(parents=True, exist_ok=True)
    repeats = f"median (range) of {REPEATS} interleaved repeats"
    caption = f"{repeats}; CPU-ms: of the calling process; PostgreSQL's data lies in /tmp"
    show("queue: durable operations in one process", measure_queue(options.dir), caption, options.json)
    caption = f"{LOOKS} looks in a row; aims: claim p99 at most twice as long, a position below 50 ms"
    show("queue: looks at a long queue", measure_backlog(options.dir), caption, options.json)
    title = f"queue over HTTP: {CALLERS} keep-alive connections, one gateway replica"
    caption = f"{repeats}; CPU-ms: all of the server's processes, the load generator not included"
    show(title, measure_http(options.dir), caption, options.json)


if __name__ == "__main__":
    header()
    main()
