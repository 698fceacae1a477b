"""A disk without room: what is refused, and that nothing half written stays."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.files.store import FileStore, open_files
from deployments.files.uploads import Uploads
from schemas.errors import StoreDown, StoreFull
from tests.faults import disks
from tests.support.uploading import begun, folder, parted, sent, uploaded

SIZE = 2 * 2**20


@pytest.fixture(params=["small disk", "limit on files"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of two MiB; or one on which no file may have more, which needs no right to mount it."""
    path = tmp_path / "disk"
    path.mkdir()
    if request.param == "limit on files":
        disks.limit_files(SIZE)
        yield path
        disks.limit_files(None)
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr}")
    yield path
    subprocess.run(["umount", path], check=True)


only_small_disk = pytest.mark.parametrize("disk", ["small disk"], indirect=True)


@pytest.fixture
def files(disk: Path) -> FileStore:
    return open_files(f"file://{disk}/files")


def kept(files: FileStore) -> list[str]:
    """All that lies in the store, but for the secret."""
    return sorted(path.name for path in folder(files).rglob("*") if path.is_file() and path.name != "secret")


async def test_t32_a_result_that_does_not_fit_is_told_and_leaves_nothing(files: FileStore) -> None:
    small = await files.save(b"x" * 1000, "image/png")
    before = kept(files)
    with pytest.raises(StoreDown) as failed:
        await files.save(b"x" * (2 * SIZE), "image/png")
    assert failed.value.status == 503 and failed.value.retryable
    assert kept(files) == before == [small]
    assert await files.content(small) == b"x" * 1000
    assert await files.content(await files.save(b"y", "image/png")) == b"y"  # there is room again


async def test_t32_an_upload_that_does_not_fit_is_told_and_leaves_nothing(files: FileStore) -> None:
    uploads = Uploads(files, 10 * SIZE)
    first = await uploaded(uploads, b"x" * 1000)
    before = kept(files)
    ticket = await begun(uploads)
    with pytest.raises(StoreFull) as failed:
        await uploads.receive(ticket, 1, sent(b"x" * (2 * SIZE)))
    assert failed.value.status == 507
    assert kept(files) == before
    assert await files.content(first.key) == b"x" * 1000
    tags = await parted(uploads, ticket, {1: b"small enough"})
    await uploads.complete(ticket, tags)
    assert await files.content(ticket.key) == b"small enough"


@only_small_disk
async def test_t32_parts_that_do_not_fit_twice_can_be_completed_later(files: FileStore) -> None:
    uploads = Uploads(files, 10 * SIZE)
    ticket = await begun(uploads)
    tags = await parted(uploads, ticket, {1: b"a" * 700_000, 2: b"b" * 700_000})
    with pytest.raises(StoreFull):
        await uploads.complete(ticket, tags)  # for a moment the file lies there twice
    assert not await files.has(ticket.key)
    assert [name for name in kept(files) if "#" in name] == []


@only_small_disk
async def test_t32_uploads_are_refused_while_there_is_a_reserve(files: FileStore) -> None:
    uploads = Uploads(files, SIZE, min_free_bytes=SIZE // 2)
    ticket = await begun(uploads)
    with pytest.raises(StoreFull):
        await uploads.receive(ticket, 1, sent(b"x" * (SIZE // 2 + 100_000)))
    assert kept(files) == []
    await files.save(b"x" * (SIZE // 2 + 100_000), "image/png")  # results may have it
    for refused in (uploads.receive(ticket, 2, sent(b"x")), uploads.begin("cat.png", "image/png", None)):
        with pytest.raises(StoreFull, match="no room"):
            await refused
