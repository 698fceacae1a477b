"""What is going on while a process exits at a point: each scenario passes a part of the points.

They run in processes of their own; each is followed by another process that finds what was left.
"""

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import Connection

from deployments import queue as queue_room
from deployments.files.cache import Cache
from deployments.files.fetch import Downloaded
from deployments.files.fetch import Report as Progress
from deployments.files.origins import Origin
from deployments.files.store import open_files
from deployments.files.sweeper import Sweeper
from deployments.files.uploads import Uploads
from deployments.queue import Setback
from deployments.webhooks.keyring import Keyring
from schemas.deliveries import Outcome
from schemas.jobs import Claim, JobResult, Logged, Priority
from schemas.settings import WeightSettings
from tests.faults.fronts import LEASE, LONG_S, SECOND, Front, Place, Watch, finish, front, tell_of_files
from tests.faults.history import History
from tests.faults.telling import Client, TellingQueue, settled

DAY_S = 86_400.0

# --- a day of the queue ---


async def play_queue(place: Place) -> None:
    """By hand what takes time or another process; the rest by a dispatcher and a sender."""
    async with front(place) as one:
        await _by_hand(one, place)
        await _long_ago(one, place)
        await one.serve()
        await one.drain()
        await _afterwards(one, place)


async def end_queue(place: Place) -> None:
    """Clients whose submit was not answered try again under its key; then everything ends."""
    async with front(place, clock=Watch(100)) as again:
        events = again.history.read()
        answered = {each["of"] for each in events if each["kind"] in ("accepted", "refused")}
        for each in events:
            is_open = each["kind"] == "submit" and each["id"] not in answered
            if is_open and each["key"] and not each["forgettable"]:
                await again.client.submit(key=each["key"], webhook_url=each["webhook"])
    await finish(place)


async def _by_hand(one: Front, place: Place) -> None:
    queue, client = one.queue, one.client
    await queue.leads("something", "somebody")
    await client.submit(webhook_url=place.hook())
    await client.submit("lost", webhook_url=place.hook("flaky"))
    await client.submit(key="k", webhook_url=place.hook())
    await client.submit(key="k", webhook_url=place.hook())
    await client.submit(priority=Priority.LOW)
    await Client(queue, one.history, "bob").submit("slow")
    await _in_one_group(one)
    waits = await client.submit(model="second", endpoint_id=SECOND)
    assert waits is not None
    await client.look(waits)
    await client.cancel(waits)
    runs = await _claimed(one)
    await client.cancel(runs.job.request_id)
    await client.look(runs.job.request_id)
    assert await queue.finish(runs, JobResult.success({"nonce": None}, 0.1))
    goes_on = await _claimed(one)
    assert await queue.heartbeat([goes_on])
    assert await queue.record(goes_on, [Logged("under way")])
    assert await queue.release(goes_on, Setback.RETURNED)
    [hooked] = await queue.claim("second", "hand", 1)
    assert await queue.release(hooked, Setback.RETURNED)
    told = await _claimed(one, webhook_url=place.hook(), priority=Priority.NORMAL, tenant="carol")
    assert await queue.finish(told, JobResult.success({"told": True}, 0.1))
    [delivery] = await one.outbox.claim({"127.0.0.1": 1})
    assert await one.outbox.release(delivery, Outcome(None, "stopped", 0.0))


async def _claimed(one: Front, tenant: str = "alice", **fields: Any) -> Claim:
    client = Client(one.queue, one.history, tenant)
    request_id = await client.submit(model="second", endpoint_id=SECOND, **fields)
    for claim in await one.queue.claim("second", "hand", 10):
        if claim.job.request_id == request_id:
            return claim
        await one.queue.release(claim, Setback.RETURNED)
    raise AssertionError("what was submitted can be claimed")


async def _in_one_group(one: Front) -> None:
    """Three submits share a commit, of which one is refused."""
    gate = threading.Event()

    def hold(_: Connection) -> None:
        gate.wait(10)

    holding = asyncio.create_task(one.database.write(hold))
    submits = [asyncio.create_task(one.client.submit(max_ahead=limit)) for limit in (None, 0, None)]
    for _ in range(10):
        await asyncio.sleep(0)  # until all of them wait for the writer
    gate.set()
    await asyncio.gather(holding, *submits)


async def _long_ago(one: Front, place: Place) -> None:
    """What time has made due: each by a queue whose clock goes behind."""
    month_ago, hours_ago = _behind(one, 31 * DAY_S), _behind(one, 2 * 3600)
    just_now, moments_ago = _behind(one, 10), _behind(one, 90)
    pasts: list[tuple[TellingQueue, dict[str, Any]]]
    pasts = [(month_ago, {"key": "old"}), (hours_ago, {"stores_io": False})]
    for queue, fields in pasts:
        client = Client(queue, one.history)
        request_id = await client.submit(
            model="second",
            endpoint_id=SECOND,
            is_forgettable=True,
            **fields,
        )
        for claim in await queue.claim("second", "hand", 10):
            if claim.job.request_id == request_id:
                await queue.finish(claim, JobResult.success({"old": True}, 0.1))
            else:
                await queue.release(claim, Setback.RETURNED)
    await Client(just_now, one.history).submit(
        start_timeout_s=5, webhook_url=place.hook(), model="second", endpoint_id=SECOND
    )
    await Client(moments_ago, one.history).submit(model="second", endpoint_id=SECOND)
    assert await moments_ago.claim("second", "a ghost", 10)
    await one.outbox.claim({"127.0.0.1": 1})  # its sender is never heard of again
    one.outbox._clock = lambda: time.time() + 30


def _behind(one: Front, seconds: float) -> TellingQueue:
    return TellingQueue(one.history, one.database, LEASE, clock=lambda: time.time() - seconds)


async def _afterwards(one: Front, place: Place) -> None:
    told = [each.request_id for each in await one.outbox.newest(10)]
    one.history.write("redelivered", id=told[0])
    await one.outbox.redeliver(told[0])
    await settled(one.outbox)
    one.history.write("erasing", id=told[1])
    done = await one.queue.erase(told[1], "alice") or await one.queue.erase(told[1], "carol")
    assert done is not None
    for each in told:
        await one.client.look(each)


# --- a day of the files ---

DRAWN = [bytes([number]) * 300_000 for number in range(3)]
WEIGHTS = [(2).to_bytes(8, "little") + b"{}" + bytes([number]) * 1000 for number in range(3)]


async def play_files(place: Place) -> None:
    files = open_files(f"file://{place.folder}/files")
    await files.remove(await files.save(DRAWN[0], "image/png", keep_s=60))
    await files.save(DRAWN[0], "image/png", keep_s=60)
    uploads = Uploads(files, 10**7)
    note = History(place.history)
    for parts in ({1: DRAWN[0]}, {1: DRAWN[1], 2: DRAWN[2]}):
        ticket = await uploads.begin("a.png", "image/png", 60)
        note.write("ticket", signed=uploads.sign(ticket), key=ticket.key, parts=len(parts))
        tags = {
            number: await uploads.receive(ticket, number, _chunks(data)) for number, data in parts.items()
        }
        await uploads.complete(ticket, tags)
        note.write("complete", key=ticket.key)
    later = open_files(f"file://{place.folder}/files", clock=lambda: time.time() + LONG_S)
    await Sweeper(later, 1).sweep()
    note.write("swept")
    keyring = Keyring(place.folder / "keys", 100)
    note.write("key", jwks=keyring.jwks())
    keyring.rotate()
    Keyring(place.folder / "keys", 100, lambda: time.time() + LONG_S).rotate()
    await _cache(place.folder, len(WEIGHTS))


async def end_files(place: Place) -> None:
    """Who was not answered sends again; then nothing is half made, and nothing is left."""
    files = open_files(f"file://{place.folder}/files")
    uploads = Uploads(files, 10**7)
    note = History(place.history)
    events = note.read()
    done = {each["key"] for each in events if each["kind"] == "complete"}
    is_swept = any(each["kind"] == "swept" for each in events)
    for each in events:
        if each["kind"] != "ticket" or (each["key"] in done and is_swept):
            continue
        contents = DRAWN[:1] if each["parts"] == 1 else DRAWN[1:]
        if each["key"] not in done and not await files.is_there(each["key"]):
            ticket = uploads.ticket(each["signed"], each["key"])
            tags = {n: await uploads.receive(ticket, n, _chunks(data)) for n, data in enumerate(contents, 1)}
            await uploads.complete(ticket, tags)
        data = await files.content(each["key"])
        swept_meanwhile = data is None and len(done) == 2
        note.write("file", name=each["key"], is_right=swept_meanwhile or data == b"".join(contents))
    await tell_of_files(note, place.folder / "files")
    keys = Keyring(place.folder / "keys", LONG_S * 3).jwks()["keys"]
    for each in events:
        if each["kind"] == "key":
            kids = {key["kid"] for key in keys}
            # the second rotation, a million seconds later, takes the first one's away for good
            is_right = len(keys) >= 2 or {key["kid"] for key in each["jwks"]["keys"]} <= kids
            note.write("file", name="the key that signs", is_right=is_right)
    Keyring(place.folder / "keys", 100, lambda: time.time() + 2 * LONG_S).rotate()
    note.write("left", what="half-made keys", count=len(list((place.folder / "keys").glob("*.new"))))
    await _cache(place.folder, len(WEIGHTS))
    cache = place.folder / "cache"
    damaged = Cache(_weights(place.folder), 0).check_integrity()
    note.write("left", what="damaged weights", count=len(damaged))
    torn = [*cache.glob("*.part"), *cache.glob("folders.draft")]
    note.write("left", what="half downloads", count=len(torn))


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _cache(folder: Path, count: int) -> None:
    """Three files through a cache that holds two, and a folder of links to them."""
    cache = Cache(_weights(folder), 0)
    for number in range(count):
        lease = await cache.locate(_origin(number), lambda line: None)
        with lease as path:
            assert path.read_bytes() == WEIGHTS[number]
            again = await cache.locate(_origin(number), lambda line: None)
            with cache.gather({"unet/model.safetensors": again}) as gathered:
                assert (gathered / "unet" / "model.safetensors").read_bytes() == WEIGHTS[number]


def _weights(folder: Path) -> WeightSettings:
    return WeightSettings(cache=f"file://{folder}/cache", cache_bytes=2 * len(WEIGHTS[0]) + 10)


def _origin(number: int) -> Origin:
    async def write(file: BinaryIO, limit: int, progress: Progress, tag: str | None) -> Downloaded:
        file.write(WEIGHTS[number])
        return Downloaded(len(WEIGHTS[number]), hashlib.sha256(WEIGHTS[number]).hexdigest(), None)

    return Origin(f"origin {number}", f"origin {number}", write, 10**6)


# --- a migration ---


async def play_migration(place: Place) -> None:
    queue_room.migrate(place.queue_url)


async def end_migration(place: Place) -> None:
    """The next process brings the tables up, and works."""
    async with front(place) as again:
        await again.client.submit()
    await finish(place)
