"""What is removed from a real folder, and when."""

import asyncio
from pathlib import Path

import pytest

from deployments.files.store import FileStore, open_files
from deployments.files.sweeper import Sweeper
from deployments.files.uploads import SLACK_S, TICKET_S, Uploads
from schemas.errors import Forbidden
from tests.support.uploading import Clock, begun, folder, parted, uploaded


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(tmp_path: Path, clock: Clock) -> FileStore:
    return open_files(f"file://{tmp_path}/files", clock)


@pytest.fixture
def uploads(files: FileStore) -> Uploads:
    return Uploads(files, 1_000_000)


@pytest.fixture
def sweeper(files: FileStore) -> Sweeper:
    return Sweeper(files, 3600)


def kept(files: FileStore) -> set[str]:
    paths = (path for path in folder(files).rglob("*") if path.is_file())
    return {str(path.relative_to(folder(files))) for path in paths}


async def test_a_file_goes_when_its_sender_wanted(
    uploads: Uploads, files: FileStore, sweeper: Sweeper, clock: Clock
) -> None:
    short, long = await uploaded(uploads, keep_s=60), await uploaded(uploads)
    clock.ahead = 61
    assert await files.open(short.key) is None and not await files.has(short.key)
    assert await files.has(long.key)
    assert await sweeper.sweep() == 1
    assert short.key not in kept(files)
    with pytest.raises(Forbidden):  # its ticket is still good, its content is not another's
        await uploads.complete(short, await parted(uploads, short, {1: b"y"}))
    clock.ahead = TICKET_S + SLACK_S + 61
    assert await sweeper.sweep() == 0
    assert kept(files) == {long.key, f"details/{long.key}"}


async def test_an_output_goes_when_its_caller_wanted(
    files: FileStore, sweeper: Sweeper, clock: Clock
) -> None:
    short, long = await files.save(b"x", "image/png", 60), await files.save(b"x", "image/png")
    found = await files.open(short)
    assert found is not None and found.left_s is not None and 58 < found.left_s <= 60
    assert found.content_type == "image/png"
    assert await sweeper.sweep() == 0
    clock.ahead = 60
    assert await files.open(short) is None and not await files.has(short)
    assert await sweeper.sweep() == 1
    assert kept(files) == {long}


async def test_what_was_given_up_is_removed_after_its_ticket(
    uploads: Uploads, files: FileStore, sweeper: Sweeper, clock: Clock
) -> None:
    ticket = await begun(uploads)
    await parted(uploads, ticket, {1: b"x"})
    for torn in (f"uploads/{ticket.key}/0123#1", f"{'0' * 32}.png#1"):
        (folder(files) / torn).write_bytes(b"of a process that was killed")
    clock.ahead = TICKET_S
    await sweeper.sweep()
    assert len(kept(files)) == 3
    clock.ahead = TICKET_S + SLACK_S + 1
    await sweeper.sweep()
    assert kept(files) == set()


async def test_an_upload_that_goes_on_is_kept(
    uploads: Uploads, files: FileStore, sweeper: Sweeper, clock: Clock
) -> None:
    ticket = await begun(uploads)
    tags = await parted(uploads, ticket, {1: b"x"})
    clock.ahead = TICKET_S - 1
    await sweeper.sweep()
    await uploads.complete(ticket, tags)
    assert await files.has(ticket.key)


async def test_a_sweep_that_was_cut_off_is_finished_by_the_next(
    uploads: Uploads, files: FileStore, sweeper: Sweeper, clock: Clock
) -> None:
    tickets = [await uploaded(uploads, keep_s=60) for _ in range(3)]
    (folder(files) / tickets[0].key).unlink()  # as a process that died in the middle left it
    (folder(files) / "details" / tickets[0].key).unlink()
    (folder(files) / "expiring" / "not a mark").write_bytes(b"")
    clock.ahead = TICKET_S + 61
    assert await sweeper.sweep() == 2
    assert kept(files) == {"expiring/not a mark"}


async def test_several_sweep_at_once(uploads: Uploads, files: FileStore, clock: Clock) -> None:
    for _ in range(20):
        await uploaded(uploads, keep_s=60)
    clock.ahead = TICKET_S + 61
    others = [Sweeper(open_files(folder(files).as_uri(), clock), 3600) for _ in range(4)]
    counts = await asyncio.gather(*(each.sweep() for each in others))
    assert sum(counts) == 20
    assert kept(files) == set()


async def test_it_sweeps_at_the_start_and_again_until_closed(
    uploads: Uploads, files: FileStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeper = Sweeper(files, 0.001)
    swept = asyncio.Queue[int]()
    inner = sweeper.sweep

    async def told() -> int:
        count = await inner()
        swept.put_nowait(count)
        return count

    monkeypatch.setattr(sweeper, "sweep", told)
    await uploaded(uploads, keep_s=60)
    sweeper.start()
    assert await swept.get() == 0
    clock.ahead = 61
    while await swept.get() == 0:
        pass
    assert sweeper.is_alive
    await sweeper.close()
    assert not sweeper.is_alive


async def test_it_outlives_a_store_that_fails(
    files: FileStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sweeper = Sweeper(files, 0.001)
    again = asyncio.Event()
    tries = 0

    async def failing() -> int:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OSError("the disk is away")
        again.set()
        return 0

    monkeypatch.setattr(sweeper, "sweep", failing)
    sweeper.start()
    await again.wait()
    assert sweeper.is_alive and "could not be swept" in caplog.text
    await sweeper.close()
