"""A front without HTTP and without Ray: queue, dispatcher, sender and files, all real, over one model."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from deployments import dispatcher as dispatcher_module
from deployments.dispatcher import Dispatcher
from deployments.files.egress import Egress
from deployments.files.store import FileStore, open_files
from deployments.files.sweeper import Sweeper
from deployments.queue import Outbox, open_database
from deployments.queue.database import Database
from deployments.webhooks import sender as sender_module
from deployments.webhooks.keyring import Keyring
from deployments.webhooks.sender import Sender
from pipelines.registry import endpoint
from schemas.errors import StoreDown
from schemas.settings import Catalogue, LeaseSettings, WebhookSettings
from tests.faults.history import History
from tests.faults.telling import Artist, Client, Painter, TellingQueue, settled, tell_the_end
from tests.support.jobs import ENDPOINT

SECOND = "fal-ai/flux-lora/image-to-image"  # the endpoint of a model that only some tests run
LEASE = LeaseSettings(lease_s=30, heartbeat_s=10, backoff_s=0)
LONG_S = 10**6  # after so long every file has expired


@dataclass(frozen=True)
class Place:
    """Where a run keeps everything; it can be sent to another process."""

    folder: Path
    queue_url: str
    receiver_url: str = "http://127.0.0.1:9"

    @property
    def history(self) -> Path:
        return self.folder / "history"

    @property
    def disk(self) -> Path:
        """Where the queue's database is, if it is a file below the folder."""
        return self.folder / "disk"

    def hook(self, name: str = "plain") -> str:
        return f"{self.receiver_url}/{name}"

    def clear(self) -> "Place":
        self.folder.mkdir(parents=True)
        return self


@dataclass(frozen=True)
class Front:
    """Everything of one process."""

    history: History
    database: Database
    queue: TellingQueue
    outbox: Outbox
    dispatcher: Dispatcher
    sender: Sender
    files: FileStore
    client: Client

    async def serve(self, window: int = 8, run_limit_s: float | None = None) -> None:
        """Begin to run and to send."""
        models = {
            "flux": {"endpoints": [ENDPOINT], "window": window, "run_limit_s": run_limit_s},
            "second": {"endpoints": [SECOND], "prefetch": 0},
        }
        await self.dispatcher.configure(Catalogue.model_validate({"models": models}))
        self.sender.start()

    async def drain(self) -> None:
        """Wait until everything that was accepted has ended, and its webhooks."""
        await self.end()
        await settled(self.outbox)

    async def end(self) -> None:
        """Wait until everything that was accepted has ended."""
        events = self.history.read()
        submits = {each["id"]: each for each in events if each["kind"] == "submit"}
        accepted = [each for each in events if each["kind"] == "accepted"]
        for each in accepted:
            if not submits[each["of"]]["forgettable"]:
                client = Client(self.queue, self.history, each["tenant"])
                await client.end(each["id"])


@dataclass
class Watch:
    """A clock that can be set."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@asynccontextmanager
async def front(
    place: Place,
    *,
    clock: Watch | None = None,
    lease: LeaseSettings = LEASE,
    artist: type[Artist] = Artist,
    patience_s: float = 0,
) -> AsyncIterator[Front]:
    """A front, closed at the end. Its store may be down for `patience_s` before it is opened."""
    clock = clock or Watch()
    # a look at the clock now and then finds what falls due; tests need not wait for it
    dispatcher_module.IDLE_S = 0.05
    sender_module.IDLE_S = 0.05
    history = History(place.history)
    history.write("limits", max_attempts=lease.max_attempts, max_crashes=lease.max_crashes)
    database = await _opened(place.queue_url, patience_s)
    queue = TellingQueue(history, database, lease, clock)
    settings = WebhookSettings(
        allowed_networks=("127.0.0.0/8",), allowed_ports=(), timeout_s=10, lease_s=20, retries_s=(0.05,) * 5
    )
    outbox = Outbox(await _opened(place.queue_url, patience_s), settings.lease_s, clock)
    files = open_files(f"file://{place.folder}/files")
    model = artist(history, files, clock)
    dispatcher = Dispatcher(queue, lease, model.connect, lambda each: endpoint(each).input_type())
    keyring = Keyring(place.folder / "keys", 86_400, clock)
    sender = Sender(outbox, Egress(settings), keyring, settings)
    try:
        yield Front(history, database, queue, outbox, dispatcher, sender, files, Client(queue, history))
    finally:
        await sender.close()
        await dispatcher.close()
        await outbox.close()
        await queue.close()
        history.close()


async def _opened(url: str, patience_s: float) -> Database:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return open_database(url)
        except StoreDown:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


async def finish(place: Place, ahead_s: float = 100) -> None:
    """Start anew on what is left of a run, let everything end, and write down how it did."""
    async with front(place, clock=Watch(ahead_s), artist=Painter) as again:
        await again.serve()
        await again.drain()
        await again.dispatcher.close()
        await again.sender.close()
        await tell_the_end(again.history, again.database, again.files)
        await tell_of_files(again.history, place.folder / "files")


async def tell_of_files(history: History, folder: Path) -> None:
    """Sweep at a time when every file has expired, and write down what is left."""
    later = open_files(f"file://{folder}", clock=lambda: time.time() + LONG_S)
    await Sweeper(later, 1).sweep()
    left = [each for each in folder.rglob("*") if each.is_file() and each.name != "secret"]
    history.write("left", what="files", count=len(left), names=[str(each) for each in left[:5]])
