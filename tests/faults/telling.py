"""A queue, a model and a client that write down what they see, for the checker."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import select

from deployments.files.store import FileStore
from deployments.queue import Outbox, Queue
from deployments.queue.database import Database
from deployments.queue.tables import deliveries, requests
from schemas.errors import DarkroomError, StoreDown, WorkerLost
from schemas.jobs import (
    Backlog,
    CancelOutcome,
    Claim,
    Job,
    JobEvent,
    JobResult,
    Logged,
    Once,
    Previewed,
    State,
    Update,
)
from schemas.settings import LeaseSettings
from tests.faults.history import History, digest
from tests.support.jobs import make_job

KEEP_S = 86_400  # how long the pictures are kept: longer than any run
OTHER = "mallory"  # a tenant that has no request


class TellingQueue(Queue):
    """Tells of every claim, every start that is on disk, and every commit."""

    def __init__(
        self,
        history: History,
        database: Database,
        lease: LeaseSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(database, lease, clock=clock)
        self._history = history

    async def claim(self, model: str, owner: str, limit: int, low_limit: int | None = None) -> list[Claim]:
        asked = time.monotonic()
        claims = await super().claim(model, owner, limit, low_limit)
        for each in claims:
            held = {"id": each.job.request_id, "fence": each.fence, "attempt": each.attempt}
            self._history.write("claimed", asked=asked, **held)
        return claims

    async def begin(self, claim: Claim) -> bool:
        is_held = await super().begin(claim)
        if is_held:
            self._history.write("begun", id=claim.job.request_id, clock=self.now())
        return is_held

    async def finish(self, claim: Claim, result: JobResult, news: Sequence[JobEvent] = ()) -> bool:
        what = {"id": claim.job.request_id, "fence": claim.fence}
        self._history.write("committing", **what)
        held = await super().finish(claim, result, news)
        self._history.write("committed", held=held, digest=digest(result.body), **what)
        return held


class Artist:
    """A ModelHandle. It draws a file of random bytes, and does before what the prompt says:

    `lost` loses its worker once, `deadly` each time, `slow` takes a moment, `hang` never ends, and
    `gate PATH` waits until there is a file.
    """

    def __init__(self, history: History, files: FileStore, clock: Callable[[], float] = time.time) -> None:
        self._history = history
        self._files = files
        self._clock = clock
        self._lost: set[str] = set()

    def connect(self, name: str) -> "Artist":
        return self

    async def prefetch(self, job: Job) -> None:
        """There is nothing to fetch."""

    async def generate(self, job: Job, backlog: Backlog) -> AsyncGenerator[Update]:
        nonce = uuid4().hex
        self._history.write("began", id=job.request_id, nonce=nonce, clock=self._clock())
        yield Update((Logged("it begins"), Previewed({"images": []})))
        await self._meet(job)
        drawn = nonce.encode() * 32
        key = await self._save(drawn)
        image = {"url": self._files.url(key, "http://here"), "sha256": sha256(drawn).hexdigest()}
        yield Update((Logged("drawn"),), JobResult.success({"nonce": nonce, "images": [image]}, 0.1))

    async def _meet(self, job: Job) -> None:
        """What lies in its way."""
        what, _, path = job.input["prompt"].partition(" ")
        if what == "deadly" or (what == "lost" and job.request_id not in self._lost):
            self._lost.add(job.request_id)
            raise WorkerLost("gone")
        if what == "slow":
            await asyncio.sleep(0.02)
        if what == "hang":
            await asyncio.Event().wait()
        while what == "gate" and not Path(path).exists():
            await asyncio.sleep(0.01)

    async def _save(self, drawn: bytes) -> str:
        while True:
            try:
                return await self._files.save(drawn, "image/png", KEEP_S)
            except StoreDown:
                await asyncio.sleep(0.05)


class Painter(Artist):
    """One that nothing lies in the way of."""

    async def _meet(self, job: Job) -> None:
        """Nothing."""


class Client:
    """A caller that remembers what it was told."""

    def __init__(self, queue: Queue, history: History, tenant: str = "alice") -> None:
        self._queue = queue
        self._history = history
        self._tenant = tenant

    async def submit(
        self,
        prompt: str = "plain",
        *,
        key: str | None = None,
        is_forgettable: bool = False,
        max_ahead: int | None = None,
        **fields: Any,
    ) -> str | None:
        """The id that the server answered with; None when it refused."""
        job = make_job(input={"prompt": prompt}, tenant=self._tenant, **fields)
        timeout_s = job.start_timeout_s
        self._history.write(
            "submit",
            id=job.request_id,
            tenant=self._tenant,
            model=job.model,
            priority=int(job.priority),
            key=key,
            webhook=job.webhook_url,
            deadline=None if timeout_s is None else self._queue.now() + timeout_s,
            forgettable=is_forgettable,
        )
        once = None if key is None else Once(key, "the same")
        try:
            receipt = await self._queue.submit(job, (Logged("accepted"),), max_ahead, once)
        except DarkroomError as error:
            is_unknown = isinstance(error, StoreDown)  # the commit's answer may have been lost
            self._history.write("refused", of=job.request_id, is_unknown=is_unknown)
            return None
        told = {"id": receipt.request_id, "key": key, "tenant": self._tenant}
        self._history.write("accepted", of=job.request_id, **told)
        return receipt.request_id

    async def insist(self, prompt: str = "plain", **fields: Any) -> str:
        """Submit under a key of its own until the server takes it, as a client does whose server is down."""
        key = uuid4().hex
        while (request_id := await self.submit(prompt, key=key, **fields)) is None:
            await asyncio.sleep(0.02)
        return request_id

    async def look(self, request_id: str) -> State | None:
        """What the request's own tenant sees, and what another one does."""
        asked = time.monotonic()
        record = await self._queue.get(request_id, self._tenant)
        if record is not None:
            result = record.result
            self._history.write(
                "seen",
                id=request_id,
                tenant=record.job.tenant,
                state=record.state,
                error_type=result and result.error_type,
                digest=None if result is None else digest(result.body),
                asked=asked,
            )
        others = await self._queue.get(request_id, OTHER)
        self._history.write("peeked", id=request_id, tenant=OTHER, found=others is not None)
        return None if record is None else record.state

    async def cancel(self, request_id: str) -> CancelOutcome | None:
        """None when the database failed: nobody knows."""
        self._history.write("cancelling", id=request_id)
        try:
            outcome = await self._queue.cancel(request_id, self._tenant)
        except StoreDown:
            return None
        self._history.write("cancelled", id=request_id, outcome=outcome)
        return outcome

    async def end(self, request_id: str) -> None:
        """Wait until the request is completed."""
        async for _ in self._queue.watch(request_id, self._tenant):
            pass
        await self.look(request_id)


async def settled(outbox: Outbox) -> None:
    """Wait until no webhook is owed any more."""
    while any(each.ended_at is None for each in await outbox.newest(10_000)):
        await asyncio.sleep(0.01)


async def tell_the_end(history: History, database: Database, files: FileStore) -> None:
    """Write down what is in the tables when all is over, and whether the pictures are whole."""
    rows = await database.read(lambda connection: connection.execute(select(requests)).mappings().all())
    owed = await database.read(lambda connection: connection.execute(select(deliveries)).mappings().all())
    webhooks = {each["request_id"]: each["state"] for each in owed}
    same = ("tenant", "state", "status", "error_type", "attempts", "crashes", "finished_at")
    for row in rows:
        body = row["body"] or {}
        facts = {name: row[name] for name in same}
        history.write(
            "final",
            id=row["request_id"],
            digest=digest(row["body"]),
            nonce=body.get("nonce"),
            webhook=webhooks.get(row["request_id"]),
            **facts,
        )
        for image in body.get("images", []):
            key = image["url"].rpartition("/")[2]
            data = await files.content(key)
            is_right = data is not None and sha256(data).hexdigest() == image["sha256"]
            history.write("file", name=key, is_right=is_right)
    history.write("left", what="leases", count=sum(row["lease_until"] is not None for row in rows))
    history.write("left", what="deliveries", count=sum(each["lease_until"] is not None for each in owed))
