"""What fal's clients cost the server while they wait, how fast many hear of an end, and files both ways.

The clients are fal's own, in processes of their own; beside them the same requests over bare sockets.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import httpx

from benchmarks.load import drive, request
from benchmarks.measure import Row, arguments, cpu_s, header, percentile, serving, show
from benchmarks.queue_throughput import stopped
from benchmarks.waiting import FIELDS
from tests.support.jobs import ENDPOINT
from tests.support.server import Server

CLIENTS, SECONDS, REPEATS = 100, 4.0, 3
PYTHON_MS, NODE_MS = 100, 500  # how often fal's clients ask unless told otherwise
WATCHERS = 500
AHEAD = 20  # more than the model's window: what comes after them waits
FILE_BYTES, SENDERS = 64 * 2**20, 4
MIB = 2**20
NODE = Path(__file__).parents[1] / "tests" / "clients" / "node"

Rate = Callable[[Server], tuple[float, float]]  # calls a second, CPU seconds that the server used meanwhile


def waiting(command: list[str], interval_ms: int, server: Server) -> tuple[float, float]:
    """Real clients, in a process of their own."""
    told = [*command, str(CLIENTS), str(interval_ms), str(SECONDS)]
    with subprocess.Popen(
        told, cwd=NODE if command[0] == "node" else None, stdin=-1, stdout=-1, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        used = cpu_s(server.pids())
        process.stdin.write("go\n")
        process.stdin.flush()
        rate = float(process.stdout.readline())
        return rate, cpu_s(server.pids()) - used


def bare(interval_ms: int, server: Server) -> tuple[float, float]:
    """The same requests from as many sockets, each so long after the last answer."""
    path = urlsplit(submitted(server)["status_url"]).path
    poll = request(server.url, "GET", f"{path}?logs=false")
    used = cpu_s(server.pids())
    tally = drive(server.url, CLIENTS, SECONDS, lambda _: poll, interval_ms / 1e3)
    return tally.per_s, cpu_s(server.pids()) - used


def submitted(server: Server) -> dict[str, str]:
    answer = httpx.post(f"{server.url}/queue/{ENDPOINT}", json=FIELDS)
    receipt: dict[str, str] = answer.raise_for_status().json()
    return receipt


def ways(url: str) -> dict[str, Rate]:
    python = [sys.executable, "-m", "benchmarks.waiting", url]
    found: dict[str, Rate] = {
        f"{CLIENTS} of fal's Python clients, every {PYTHON_MS} ms": partial(waiting, python, PYTHON_MS),
        f"the same requests, every {PYTHON_MS} ms": partial(bare, PYTHON_MS),
    }
    if shutil.which("node") is not None:
        if not (NODE / "node_modules").exists():
            subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=NODE, check=True)
        node = ["node", "waiting.mjs", url, ENDPOINT]
        found[f"{CLIENTS} of fal's JavaScript clients, every {NODE_MS} ms"] = partial(waiting, node, NODE_MS)
    found[f"the same requests, every {NODE_MS} ms"] = partial(bare, NODE_MS)
    found["the same requests, without a pause"] = partial(bare, 0)
    return found


def idle_cpu(server: Server) -> float:
    """CPU seconds a second when nobody asks."""
    used = cpu_s(server.pids())
    time.sleep(SECONDS)
    return (cpu_s(server.pids()) - used) / SECONDS


def measure_polls(server: Server, idle: float) -> list[Row]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways(server.url)}
    for _ in range(REPEATS):
        for name, way in ways(server.url).items():
            with stopped(server):
                found[name].append(way(server))
    return [
        {
            "clients": name,
            "polls a s": [rate for rate, _ in measured],
            "CPU-ms each": [1e3 * (cpu - idle * SECONDS) / (rate * SECONDS) for rate, cpu in measured],
        }
        for name, measured in found.items()
    ]


async def fan_out(server: Server) -> tuple[list[float], float, float]:
    """Seconds from the call that ends a request to each watcher's last event; to connect all; CPU."""
    for _ in range(AHEAD):
        submitted(server)
    receipt = submitted(server)
    parts = urlsplit(f"{receipt['status_url']}/stream")
    watching = asyncio.Semaphore(0)
    used = cpu_s(server.pids())

    async def watch() -> float:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(request(server.url, "GET", parts.path))
        await reader.readuntil(b'"IN_QUEUE"')
        watching.release()
        await reader.readuntil(b'"COMPLETED"')
        told_at = time.perf_counter()
        writer.close()
        return told_at

    began = time.perf_counter()
    watchers = [asyncio.create_task(watch()) for _ in range(WATCHERS)]
    for _ in range(WATCHERS):
        await watching.acquire()
    connected = time.perf_counter()
    async with httpx.AsyncClient() as http:
        (await http.put(receipt["cancel_url"])).raise_for_status()
    told = [at - connected for at in await asyncio.gather(*watchers)]
    return told, connected - began, cpu_s(server.pids()) - used


def measure_watchers(server: Server, idle: float) -> list[Row]:
    found = []
    for _ in range(REPEATS):
        with stopped(server):
            found.append(asyncio.run(fan_out(server)))
    return [
        {
            "watchers of one request": f"{WATCHERS} status streams",
            "connected, ms": [1e3 * connected for _, connected, _ in found],
            "told of its end: p50 ms": [1e3 * percentile(told, 50) for told, _, _ in found],
            "the last, ms": [1e3 * max(told) for told, _, _ in found],
            "CPU-ms each": [
                1e3 * (cpu - idle * (connected + max(told))) / WATCHERS for told, connected, cpu in found
            ],
        }
    ]


def upload(server: Server, data: bytes) -> str:
    """As fal's JavaScript client sends a small file. Its URL."""
    urls = httpx.post(f"{server.url}/rest/storage/upload/initiate", json={"file_name": "x"}).json()
    sent = httpx.put(urls["upload_url"], content=data, timeout=60)
    sent.raise_for_status()
    return str(urls["file_url"])


def download(url: str) -> None:
    with httpx.stream("GET", url, timeout=60) as answer:
        answer.raise_for_status()
        assert sum(map(len, answer.iter_raw())) == FILE_BYTES


def write(folder: Path, data: bytes) -> None:
    """The baseline: the bytes on the same disk, without a server. Nobody syncs them there either."""
    (folder / os.urandom(8).hex()).write_bytes(data)


def measure_files(server: Server, idle: float, folder: Path) -> list[Row]:
    data = os.urandom(FILE_BYTES)
    found: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, calls: list[Callable[[], object]]) -> list[object]:
        used, began = cpu_s(server.pids()), time.perf_counter()
        with ThreadPoolExecutor(SENDERS) as pool:
            results = [each.result() for each in [pool.submit(call) for call in calls]]
        mib = len(calls) * FILE_BYTES / MIB
        seconds, cpu = time.perf_counter() - began, cpu_s(server.pids()) - used
        found.setdefault(name, []).append((mib / seconds, 1e3 * max(0, cpu - idle * seconds) / mib))
        return results

    for _ in range(REPEATS):
        with TemporaryDirectory(dir=folder) as place:
            timed("written to the disk, without the server", [partial(write, Path(place), data)] * SENDERS)
        for count in (1, SENDERS):
            urls = timed(f"upload, {count} at once", [partial(upload, server, data)] * count)
            timed(f"download, {count} at once", [partial(download, str(url)) for url in urls])
    return [
        {
            "files": name,
            "MiB a s": [rate for rate, _ in measured],
            "CPU-ms a MiB": [cpu for _, cpu in measured],
        }
        for name, measured in found.items()
    ]


def main() -> None:
    options = arguments("What fal's clients cost while they wait, fan-out, files.")
    caption = (
        f"median (range) of {REPEATS} interleaved repeats; CPU-ms: all of the server's processes, less what "
        "they use when nobody asks"
    )
    with serving(options.dir) as server:
        idle = idle_cpu(server)
        show(
            "protocol: status polls, one gateway replica", measure_polls(server, idle), caption, options.json
        )
        show("protocol: fan-out of status streams", measure_watchers(server, idle), caption, options.json)
        title = f"protocol: files of {FILE_BYTES // MIB} MiB"
        show(title, measure_files(server, idle, options.dir), caption, options.json)


if __name__ == "__main__":
    header()
    main()
