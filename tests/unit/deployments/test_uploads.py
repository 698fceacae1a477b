"""Uploads on a real folder: what is sent is what is kept, or nothing is."""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deployments.files.store import FileStore, StoredFile, open_files
from deployments.files.uploads import TICKET_S, Ticket, Uploads
from schemas.errors import BadRequest, BodyTooLarge, Forbidden, StoreDown, StoreFull
from tests.support.uploading import Clock, begun, folder, parted, sent

LIMIT = 1_000_000


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(tmp_path: Path, clock: Clock) -> FileStore:
    return open_files(f"file://{tmp_path}/files", clock)


@pytest.fixture
def uploads(files: FileStore) -> Uploads:
    return Uploads(files, LIMIT)


async def opened(files: FileStore, key: str) -> StoredFile:
    found = await files.open(key)
    assert found is not None
    return found


async def content(files: FileStore, key: str) -> bytes:
    return b"".join([chunk async for chunk in (await opened(files, key)).chunks])


def kept(files: FileStore) -> list[Path]:
    """All that lies in the store, but for the secret."""
    return [path for path in folder(files).rglob("*") if path.is_file() and path.name != "secret"]


# -- what is sent


class Disk:
    """Of so many bytes, taken by what lies in the store."""

    def __init__(self, files: FileStore, size: int, patch: pytest.MonkeyPatch) -> None:
        self._files, self._size, self.least = files, size, size
        patch.setattr(files.place, "free_bytes", self.free_bytes)

    def free_bytes(self) -> int:
        free = self._size - sum(path.stat().st_size for path in kept(self._files))
        self.least = min(self.least, free)
        return free


@pytest.mark.parametrize("is_announced", [True, False])
async def test_t32_an_upload_leaves_free_what_is_to_stay_free(
    files: FileStore, monkeypatch: pytest.MonkeyPatch, is_announced: bool
) -> None:
    """The queue may lie on the same disk."""
    disk, data = Disk(files, 2**21, monkeypatch), bytes(2**21)
    uploads = Uploads(files, 2**22, min_free_bytes=2**20)
    ticket = await begun(uploads)
    with pytest.raises(StoreFull):
        await uploads.receive(ticket, 1, sent(data), len(data) if is_announced else None)
    assert disk.least > 2**20 - 2**18 - 10_000  # a block of what comes
    assert not kept(files)


async def test_t32_parts_are_copied_together_where_there_is_room_for_that(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(files, 3 * 2**20, monkeypatch)
    uploads = Uploads(files, 2**22, min_free_bytes=2**20)
    ticket = await begun(uploads)
    parts = await parted(uploads, ticket, {1: bytes(2**19), 2: bytes(2**19 + 1)})
    with pytest.raises(StoreFull):
        await uploads.complete(ticket, parts)
    monkeypatch.setattr(disk, "_size", 2**22)
    await uploads.complete(ticket, parts)  # when there is


@pytest.mark.parametrize("size", [0, 1, 9_999, 10_000, LIMIT])
async def test_a_file_is_what_was_sent(uploads: Uploads, files: FileStore, size: int) -> None:
    data = random.Random(size).randbytes(size)
    ticket = await begun(uploads)
    await uploads.complete(ticket, await parted(uploads, ticket, {1: data}))
    found = await opened(files, ticket.key)
    assert (found.size, found.content_type, found.name) == (size, "image/png", "cat.png")
    assert await content(files, ticket.key) == data
    assert {path.name for path in kept(files)} == {ticket.key}  # the file, and its details


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 1, 2], [2, 3, 1]])
async def test_parts_may_come_in_any_order(uploads: Uploads, files: FileStore, order: list[int]) -> None:
    ticket = await begun(uploads)
    tags = await parted(uploads, ticket, {number: bytes([number]) * 30_000 for number in order})
    await uploads.complete(ticket, tags)
    assert await content(files, ticket.key) == b"\1" * 30_000 + b"\2" * 30_000 + b"\3" * 30_000


async def test_parts_may_come_at_once(uploads: Uploads, files: FileStore) -> None:
    data = {number: random.Random(number).randbytes(50_000) for number in range(1, 21)}
    ticket = await begun(uploads)
    tags = await asyncio.gather(*(uploads.receive(ticket, n, sent(each)) for n, each in data.items()))
    await uploads.complete(ticket, dict(zip(data, tags, strict=True)))
    assert await content(files, ticket.key) == b"".join(data.values())


async def test_of_a_part_sent_again_the_one_named_is_taken(uploads: Uploads, files: FileStore) -> None:
    ticket = await begun(uploads)
    first = await uploads.receive(ticket, 1, sent(b"first"))
    assert await uploads.receive(ticket, 1, sent(b"first")) == first
    again = await uploads.receive(ticket, 1, sent(b"again"))
    await uploads.receive(ticket, 1, sent(b"a third"))
    other = await uploads.receive(ticket, 2, sent(b", second"))
    await uploads.complete(ticket, {1: again, 2: other})
    assert await content(files, ticket.key) == b"again, second"


@pytest.mark.parametrize(
    "named",
    [
        {},  # none
        {1: "a", 2: "b", 3: "c"},  # a third has not come
        {1: "a", 3: "b"},  # under another number
        {1: "b", 2: "a"},  # exchanged
        {1: "a", 2: "../../secret"},  # no tag
        {1: "a", 2: ""},
    ],
)
async def test_a_missing_part_is_named_and_can_still_be_sent(
    uploads: Uploads, files: FileStore, named: dict[int, str]
) -> None:
    ticket = await begun(uploads)
    tags = await parted(uploads, ticket, {1: b"one", 2: b"two"})
    letters = {"a": tags[1], "b": tags[2]}
    with pytest.raises(BadRequest, match=r"Part \d is missing"):
        await uploads.complete(ticket, {n: letters.get(each, each) for n, each in named.items()})
    assert not await files.has(ticket.key)
    await uploads.complete(ticket, tags)
    assert await content(files, ticket.key) == b"onetwo"


@pytest.mark.parametrize("number", [0, -1, 10_001])
async def test_a_part_number_has_bounds(uploads: Uploads, number: int) -> None:
    with pytest.raises(BadRequest, match="1 to 10000"):
        await uploads.receive(await begun(uploads), number, sent(b"x"))


async def test_completing_again_changes_nothing(uploads: Uploads, files: FileStore) -> None:
    """A client whose connection broke before the answer does that."""
    ticket = await begun(uploads)
    tags = await parted(uploads, ticket, {1: b"one", 2: b"two"})
    await asyncio.gather(*(uploads.complete(ticket, tags) for _ in range(8)))
    await uploads.complete(ticket, tags)
    await uploads.complete(ticket, await parted(uploads, ticket, {1: b"one", 2: b"two"}))
    assert await content(files, ticket.key) == b"onetwo"
    assert {path.name for path in kept(files)} == {ticket.key}


async def test_what_a_key_names_never_changes(uploads: Uploads, files: FileStore) -> None:
    ticket = await begun(uploads)
    await uploads.complete(ticket, await parted(uploads, ticket, {1: b"mine"}))
    with pytest.raises(Forbidden, match="used for another content"):
        await uploads.complete(ticket, await parted(uploads, ticket, {1: b"theirs"}))
    assert await content(files, ticket.key) == b"mine"


async def test_of_two_contents_at_once_one_wins_whole(uploads: Uploads, files: FileStore) -> None:
    ticket = await begun(uploads)
    one = await parted(uploads, ticket, {1: b"1" * 50_000, 2: b"1" * 50_000})
    two = await parted(uploads, ticket, {1: b"2" * 50_000, 2: b"2" * 50_000})
    ends = await asyncio.gather(
        *(uploads.complete(ticket, each) for each in (one, two)), return_exceptions=True
    )
    assert sorted(type(each).__name__ for each in ends) == ["Forbidden", "NoneType"]
    assert await content(files, ticket.key) in (b"1" * 100_000, b"2" * 100_000)


# -- what is too much, and what breaks off


async def test_t19_a_file_that_is_too_large_is_refused_and_not_kept(
    uploads: Uploads, files: FileStore
) -> None:
    ticket = await begun(uploads)
    for declared in (None, LIMIT):  # which is a lie
        with pytest.raises(BodyTooLarge, match=f"{LIMIT} bytes"):
            await uploads.receive(ticket, 1, sent(bytes(LIMIT + 1)), declared)
    assert kept(files) == []


async def test_a_file_that_is_announced_too_large_is_not_read(uploads: Uploads) -> None:
    body = sent(b"x")
    with pytest.raises(BodyTooLarge):
        await uploads.receive(await begun(uploads), 1, body, LIMIT + 1)
    assert await anext(body) == b"x"


async def test_parts_are_too_large_together(uploads: Uploads, files: FileStore) -> None:
    ticket = await begun(uploads)
    half = LIMIT // 2
    tags = await parted(uploads, ticket, {1: bytes(half), 2: b"x" * half})
    assert await uploads.receive(ticket, 2, sent(b"x" * half)) == tags[2]  # again is not once more
    with pytest.raises(BodyTooLarge):
        await uploads.receive(ticket, 3, sent(b"x"))
    await uploads.complete(ticket, tags)


async def test_parts_that_came_at_once_are_counted_at_the_end(uploads: Uploads, files: FileStore) -> None:
    ticket = await begun(uploads)
    gate = asyncio.Event()

    async def slow(data: bytes) -> AsyncIterator[bytes]:
        await gate.wait()
        yield data

    coming = [asyncio.create_task(uploads.receive(ticket, n, slow(bytes(LIMIT - n)))) for n in (1, 2)]
    await asyncio.sleep(0.05)  # both have been let in
    gate.set()
    tags = await asyncio.gather(*coming)
    with pytest.raises(BodyTooLarge):
        await uploads.complete(ticket, {1: tags[0], 2: tags[1]})
    assert not await files.has(ticket.key)


async def test_t32_connections_that_break_leave_nothing_behind(uploads: Uploads, files: FileStore) -> None:
    """Two hundred times, anywhere; then the file is sent again and whole."""
    data = random.Random(0).randbytes(300_000)
    draw = random.Random(1)

    async def cut(size: int) -> AsyncIterator[bytes]:
        async for chunk in sent(data[:size], draw.choice([100, 10_000])):
            yield chunk
        raise ConnectionError("the client is gone")

    ticket = await begun(uploads)
    for _ in range(200):
        with pytest.raises(ConnectionError):
            await uploads.receive(ticket, 1, cut(draw.randrange(len(data))))
    assert kept(files) == []
    await uploads.complete(ticket, await parted(uploads, ticket, {1: data}))
    assert await content(files, ticket.key) == data


async def test_a_call_that_is_cancelled_leaves_nothing_behind(uploads: Uploads, files: FileStore) -> None:
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1000)
            started.set()
            await asyncio.sleep(0.001)

    receiving = asyncio.create_task(uploads.receive(await begun(uploads), 1, endless()))
    await started.wait()
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    deadline = time.monotonic() + 5
    while kept(files) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert kept(files) == []


async def test_t19_memory_does_not_grow_with_the_file(files: FileStore) -> None:
    uploads = Uploads(files, 2**30)
    seen: list[int] = []
    block = os.urandom(65_536)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def large(megabytes: int) -> AsyncIterator[bytes]:
        for _ in range(16 * megabytes):
            seen.append(resident())
            yield block

    ticket = await begun(uploads)
    tags = {n: await uploads.receive(ticket, n, large(64)) for n in (1, 2)}
    await uploads.complete(ticket, tags)
    seen.append(resident())
    assert max(seen) - seen[0] < 48 * 2**20  # of 128


async def test_a_store_that_fails_says_so(uploads: Uploads, files: FileStore) -> None:
    (folder(files) / "uploads").write_text("in the way")
    with pytest.raises(StoreDown, match="cannot be used"):
        await uploads.receive(await begun(uploads), 1, sent(b"x"))


# -- who may


@pytest.fixture
def others(tmp_path: Path) -> Uploads:
    """The uploads of another store, with another secret."""
    return Uploads(open_files(f"file://{tmp_path}/others"), LIMIT)


async def test_any_process_with_the_same_store_takes_a_ticket(uploads: Uploads, files: FileStore) -> None:
    ticket = await begun(uploads)
    other = Uploads(open_files(folder(files).as_uri()), LIMIT)
    assert other.ticket(uploads.sign(ticket), ticket.key) == ticket
    tags = {1: await uploads.receive(ticket, 1, sent(b"a")), 2: await other.receive(ticket, 2, sent(b"b"))}
    await other.complete(ticket, tags)
    assert await content(files, ticket.key) == b"ab"


def test_ten_processes_at_once_draw_one_secret(files: FileStore) -> None:
    async def sign(uploads: Uploads) -> str:
        return await asyncio.to_thread(uploads.sign, Ticket(key="k", content_type="t", until=1))

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(sign(Uploads(files, LIMIT)) for _ in range(10)))

    assert len(set(asyncio.run(all_at_once()))) == 1
    [secret] = folder(files).glob("secret*")
    assert secret.stat().st_mode & 0o777 == 0o600


async def test_a_changed_ticket_is_refused(uploads: Uploads) -> None:
    ticket = await begun(uploads)
    text = uploads.sign(ticket)
    for changed in changes(text):
        with pytest.raises(Forbidden, match="not signed"):
            uploads.ticket(changed, ticket.key)
    for key in (ticket.key[:-1], ticket.key.replace("cat", "dog"), ""):
        with pytest.raises(Forbidden, match="not signed"):
            uploads.ticket(text, key)


def changes(text: str) -> Iterator[str]:
    """Each character another; cut; longer; nothing; and what is no text of ours at all."""
    for at, character in enumerate(text):
        yield text[:at] + ("A" if character != "A" else "B") + text[at + 1 :]
    for at in range(0, len(text), 7):
        yield text[:at]
    yield from (text + "A", text + ".", text + "=", " " + text, text * 20, ".", "..", "\ud800", "ü.ü")


async def test_a_ticket_of_another_server_is_refused(uploads: Uploads, others: Uploads) -> None:
    ticket = await begun(others)
    with pytest.raises(Forbidden, match="not signed"):
        uploads.ticket(others.sign(ticket), ticket.key)


async def test_a_ticket_ends(uploads: Uploads, clock: Clock) -> None:
    ticket = await begun(uploads)
    clock.ahead = TICKET_S - 60
    assert uploads.ticket(uploads.sign(ticket), ticket.key) == ticket
    clock.ahead = TICKET_S + 1
    with pytest.raises(Forbidden, match="expired"):
        uploads.ticket(uploads.sign(ticket), ticket.key)


async def test_a_pass_admits_until_it_ends(uploads: Uploads, others: Uploads, clock: Clock) -> None:
    text = uploads.sign(uploads.issue())
    assert uploads.admits(text)
    assert not any(uploads.admits(changed) for changed in changes(text))
    assert not uploads.admits(others.sign(others.issue()))
    assert not uploads.admits(uploads.sign(await begun(uploads)))  # a ticket is for one file
    clock.ahead = TICKET_S + 1
    assert not uploads.admits(text)


# -- names


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("cat.png", "_cat.png"),
        ("Ein Käse.png", "_Ein_K_se.png"),
        ("/etc/passwd", "_passwd"),
        ("..\\..\\boot.ini", "_boot.ini"),
        ("../..", "_file"),
        (".htaccess", "_htaccess"),
        ("a\r\nSet-Cookie: b\0", "_a_Set-Cookie_b_"),
        ('"><script>', "__script_"),
        ("猫.safetensors", "__.safetensors"),
        ("x" * 300 + ".safetensors", "x.safetensors"),
        ("%2e%2e%2fsecret", "__2e_2e_2fsecret"),
        ("", "_file.png"),
        (None, "_file.png"),
    ],
)
async def test_t11_a_name_becomes_part_of_the_key_in_plain_letters(
    uploads: Uploads, files: FileStore, name: str | None, ending: str
) -> None:
    ticket = await begun(uploads, name)
    assert ticket.key.endswith(ending)
    assert len(ticket.key) <= 120
    await uploads.complete(ticket, await parted(uploads, ticket, {1: b"x"}))
    assert (folder(files) / ticket.key).read_bytes() == b"x"


async def test_keys_differ(uploads: Uploads) -> None:
    keys = {(await begun(uploads)).key[:32] for _ in range(1000)}
    assert len(keys) == 1000


async def test_t11_nothing_but_files_can_be_opened(uploads: Uploads, files: FileStore) -> None:
    whole, half = await begun(uploads, keep_s=60), await begun(uploads)
    await uploads.complete(whole, await parted(uploads, whole, {1: b"x"}))
    await parted(uploads, half, {1: b"a part", 2: b"another"})
    uploads.sign(whole)  # draws the secret
    found = [str(path.relative_to(folder(files))) for path in folder(files).rglob("*") if path.is_file()]
    assert len(found) == 6  # a file, its details, its end; two parts; the secret
    names = {each for name in found for each in (name, name.rpartition("/")[2], f"./{name}", f"x/../{name}")}
    assert [name for name in sorted(names) if await files.open(name)] == [whole.key]
    assert not await files.has(half.key)
