"""What processes do while faults happen to them."""

import asyncio
import os
import random
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import httpx
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette

from deployments.gateway import downloads
from deployments.queue import sqlite
from schemas.errors import StoreDown, WorkerLost
from schemas.jobs import Job, Priority
from schemas.settings import LeaseSettings
from tests.faults import disks, processes
from tests.faults.fronts import Front, Place, finish, front
from tests.faults.telling import Artist, Client

SHORT = LeaseSettings(lease_s=1.5, heartbeat_s=0.3, backoff_s=0)
POISONED = 139  # as a shell tells of a segmentation fault
PATIENCE_S = 60.0  # with a store that is down when a process starts


async def serve(place: Place, lease: LeaseSettings = SHORT, artist: type[Artist] = Artist) -> None:
    """Run and send what there is, until killed."""
    async with front(place, lease=lease, artist=artist, patience_s=PATIENCE_S) as one:
        await one.serve()
        one.history.write("serving")
        await asyncio.Event().wait()


async def call(place: Place, seed: int, count: int) -> None:
    """So many requests of all kinds by three tenants, some looked at and some given up."""
    chance = random.Random(seed)
    async with front(place, patience_s=PATIENCE_S) as one:
        tenants = [Client(one.queue, one.history, name) for name in ("alice", "bob", "carol")]
        for _ in range(count):
            client = chance.choice(tenants)
            request_id = await client.insist(chance.choice(PROMPTS), **_wishes(chance, place))
            if chance.random() < 0.2:
                await client.cancel(request_id)
            if chance.random() < 0.5:
                await _look(client, request_id)
            await asyncio.sleep(chance.uniform(0, 0.02))


PROMPTS = ("plain", "slow", "slow", "lost")


def _wishes(chance: random.Random, place: Place) -> dict[str, Any]:
    return {
        "priority": chance.choice([Priority.NORMAL, Priority.NORMAL, Priority.LOW]),
        "webhook_url": chance.choice([None, place.hook()]),
        "start_timeout_s": chance.choice([None, None, None, 0.05, 60]),
    }


async def _look(client: Client, request_id: str) -> None:
    try:
        await client.look(request_id)
    except StoreDown:
        pass


async def submit_under(place: Place, key: str, count: int) -> None:
    """The same submit so many times at once."""
    async with front(place) as one:
        await asyncio.gather(*(one.client.submit(key=key) for _ in range(count)))


async def bring(place: Place, count: int, limit: int | None) -> None:
    """As many at once as one likes; what exceeds the limit is refused."""
    async with front(place) as one:
        await asyncio.gather(*(one.client.submit(max_ahead=limit) for _ in range(count)))


class Workers(Artist):
    """A model whose jobs run in processes of their own; a poison ends its process."""

    async def _meet(self, job: Job) -> None:
        worker = processes.start(work, job.input["prompt"])
        while worker.exitcode is None:
            await asyncio.sleep(0.005)
        if worker.exitcode:
            self._history.write("worker", id=job.request_id, code=worker.exitcode)
            raise WorkerLost("The worker died while it ran the request.")


async def work(prompt: str) -> None:
    """A worker, which may meet its poison."""
    if prompt == "poison":
        os._exit(POISONED)


async def submit_gated(place: Place, gate: str) -> None:
    """One request that waits for a file."""
    async with front(place) as one:
        await one.client.submit(f"gate {gate}")


async def write_at_once(place: Place) -> None:
    """Write something, or exit with 1 where another process keeps the store from it."""
    sqlite.BUSY_TIMEOUT_S = 0
    try:
        async with asyncio.timeout(1), front(place) as one:
            await one.queue.reroute({})
    except (OperationalError, StoreDown, TimeoutError):
        os._exit(1)
    os._exit(0)


async def look_for(place: Place, known: Sequence[str], unknown: Sequence[str]) -> None:
    """Raises AssertionError unless these are there, and those are not."""
    async with front(place) as one:
        for request_id in known:
            assert await one.client.look(request_id) is not None
        for request_id in unknown:
            assert await one.client.look(request_id) is None


async def on_a_small_disk(place: Place, is_mounted: bool) -> None:
    """A disk fills up while requests run, and has room again after a while."""
    if is_mounted:
        for folder in (place.disk, place.folder / "files"):
            folder.mkdir()
            disks.mount_small(folder, 3 * 2**20)
    async with front(place) as one:
        await one.serve()
        running = [await one.client.insist(f"gate {place.folder}/open", webhook_url=place.hook())]
        running += [await one.client.insist("slow") for _ in range(5)]
        _fill(place, is_mounted)
        refused = 0
        while refused < 3:  # what still fits is taken
            refused += await one.client.submit("x" * 50_000) is None
        (place.folder / "open").touch()  # the picture finds no room, or its result
        await asyncio.sleep(0.3)
        left = [each for each in (place.folder / "files").glob("*.png") if each.stat().st_size != DRAWN_BYTES]
        one.history.write("left", what="short files", count=len(left))
        _empty(place, is_mounted)
        await one.client.insist()
        await one.drain()
    await finish(place)


DRAWN_BYTES = 32 * 32  # of a picture


def _fill(place: Place, is_mounted: bool) -> None:
    if not is_mounted:
        disks.limit_files(os.stat(f"{place.disk}/queue.sqlite3-wal").st_size + 40_000)
        return
    for folder in (place.disk, place.folder / "files"):
        for size in (2**16, 2**10):
            try:
                with (folder / f"filler{size}").open("wb", buffering=0) as file:
                    while file.write(bytes(size)):
                        pass
            except OSError:
                pass  # it is full


def _empty(place: Place, is_mounted: bool) -> None:
    if not is_mounted:
        disks.limit_files(None)
        return
    for folder in (place.disk, place.folder / "files"):
        for filler in folder.glob("filler*"):
            filler.unlink()


async def with_failing(place: Place, call_name: str) -> None:
    """Submits before and after a system call begins to fail for good."""
    async with front(place) as one:
        for _ in range(5):
            assert await one.client.submit() is not None
        disks.fail(call_name)
        for _ in range(5):
            await one.client.submit()
        os._exit(0)  # nothing of it could be closed


async def with_reads_failing(place: Place) -> None:
    """Calls while requests run and pictures are read, from a disk that cannot be read any more."""
    async with front(place) as one:
        await one.serve()
        done = await one.client.insist(webhook_url=place.hook())
        await one.client.end(done)
        [picture] = [each.name for each in (place.folder / "files").glob("*.png")]
        assert await _download(one, picture) == (200, DRAWN_BYTES)
        await one.client.insist(f"gate {place.folder}/open")
        disks.fail("read", least=disks.next_descriptor())
        disks.fail("pread64")
        (place.folder / "open").touch()
        for _ in range(8):
            await one.client.submit(key=uuid4().hex, webhook_url=place.hook())
            disks.next_descriptor()  # what was closed meanwhile is filled up again
            for read in (one.client.look(done), one.files.content(picture)):
                try:
                    await read
                except StoreDown as error:
                    told = await _download(one, picture)
                    one.history.write("unread", why=repr(error.__cause__), told=told)
        one.history.write("killed", what="a dispatcher")
        os._exit(0)  # nothing of it could be closed


async def _download(one: Front, key: str) -> tuple[int, int]:
    """The status and the number of bytes that a client gets of a file."""
    transport = httpx.ASGITransport(Starlette(routes=downloads.routes(one.files)), raise_app_exceptions=False)
    async with httpx.AsyncClient(base_url="http://here", transport=transport) as http:
        answer = await http.get(f"/files/{key}")
        return answer.status_code, len(answer.content)
