"""Strangers' pictures, decoded in processes of their own."""

import asyncio
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from deployments.pictures import child
from deployments.pictures.decoders import Decoders
from schemas.errors import AssetError
from tests.support.hostile_pictures import (
    EITHER,
    OTHERS,
    REFUSED,
    SIDE,
    cut_short,
    encoded,
    many_scans,
    modes,
    polyglots,
    scene,
    turned,
)

KINDS = {"unsupported_image_format", "image_too_large", "image_load_error"}
MEMORY = 512 * 2**20


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    started = Decoders(1, time_s=120)  # what bounds the work is CPU time, so a busy machine changes nothing
    yield started
    started.close()


async def answer(decoders: Decoders, data: bytes) -> Image.Image | AssetError:
    try:
        return await decoders.decode(data)
    except AssetError as error:
        assert error.kind in KINDS
        assert len(error.message) < 600
        return error


async def refusal(decoders: Decoders, data: bytes) -> AssetError:
    found = await answer(decoders, data)
    assert isinstance(found, AssetError)
    return found


async def still_decodes(decoders: Decoders) -> None:
    found = await decoders.decode(encoded(scene(), "PNG"))
    assert found.tobytes() == scene().tobytes()


def peak(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    [line] = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in each]
    return int(line.split()[1]) * 1024


def cpu_s(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


async def bounded(decoders: Decoders, data: bytes) -> Image.Image | AssetError:
    """The answer; the process has kept to its time and its memory, or is another by now."""
    await still_decodes(decoders)
    [before] = decoders.pids()
    spent = cpu_s(before)
    found = await answer(decoders, data)
    if decoders.pids() == {before}:
        assert cpu_s(before) - spent <= child.CPU_S + 1
        assert peak(before) < MEMORY
    await still_decodes(decoders)
    return found


# -- row 15 of the threat model: pictures made to harm


@pytest.mark.parametrize("name", OTHERS)
async def test_t15_what_is_no_png_jpeg_or_webp_is_refused_by_its_content(
    decoders: Decoders, name: str
) -> None:
    error = await refusal(decoders, OTHERS[name]())
    assert error.kind == "unsupported_image_format"
    assert error.ctx == {"supported_formats": ["png", "jpeg", "webp"]}


@pytest.mark.parametrize("name", REFUSED)
async def test_t15_a_hostile_picture_is_refused(decoders: Decoders, name: str) -> None:
    assert isinstance(await bounded(decoders, REFUSED[name]()), AssetError)


@pytest.mark.parametrize("name", EITHER)
async def test_t15_a_costly_picture_stays_within_its_bounds(decoders: Decoders, name: str) -> None:
    await bounded(decoders, EITHER[name]())


async def test_t15_a_size_past_the_bound_is_told_before_a_pixel_is_decoded(decoders: Decoders) -> None:
    for name in REFUSED:
        if "50,000" in name or "65,535" in name or "past the bound" in name or "16,384" in name:
            error = await refusal(decoders, REFUSED[name]())
            assert (error.kind, error.ctx) == ("image_too_large", {"max_width": 8192, "max_height": 8192})
    assert child.MAX_PIXELS < (Image.MAX_IMAGE_PIXELS or 0)


async def test_t15_a_picture_that_is_cut_short_is_refused(decoders: Decoders) -> None:
    for name, data in cut_short():
        assert isinstance(await answer(decoders, data), AssetError), name


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (1, 20_000), (20_000, 1)])
async def test_t15_thin_pictures_are_pictures(decoders: Decoders, size: tuple[int, int]) -> None:
    for format in ("PNG", "JPEG"):
        assert (await decoders.decode(encoded(Image.new("RGB", size), format))).size == size


async def test_t15_of_what_is_also_something_else_only_the_pixels_come_through(decoders: Decoders) -> None:
    for name, data in polyglots():
        assert (await decoders.decode(data)).size == (SIDE, SIDE), name


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
async def test_t15_of_several_frames_there_is_the_first(decoders: Decoders, format: str) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    if format == "GIF":
        assert isinstance(await answer(decoders, data), AssetError)
    else:
        assert (await decoders.decode(data)).getpixel((4, 4)) == (255, 0, 0)


async def test_t15_every_mode_becomes_the_rgb_that_it_means(decoders: Decoders) -> None:
    for name, data in modes():
        found = np.asarray(await decoders.decode(data)).astype(int)
        assert found.shape == (4, 8, 3), name
        assert found[:, :4].max() <= 3 and found[:, 4:].min() >= 252, name


async def test_a_grey_of_16_bits_keeps_its_shades(decoders: Decoders) -> None:
    """As depth maps have them."""
    shades = np.linspace(0, 65535, 8 * 64).reshape(8, 64).astype(np.uint16)
    found = np.asarray(await decoders.decode(encoded(Image.fromarray(shades), "PNG")))
    assert (found == (shades >> 8)[..., None]).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("way", range(10))
async def test_t15_a_picture_is_set_upright(
    decoders: Decoders, way: int, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = turned(way, format)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    assert (await decoders.decode(data)).tobytes() == upright.tobytes()
    # and as well where it is sent in many pieces
    monkeypatch.setattr(child, "BAND_BYTES", 3 * 48 * 5)
    with Image.open(BytesIO(data)) as picture:
        assert b"".join(child._bands(picture, way)) == upright.tobytes()


# -- the processes


@contextmanager
def ended(pid: int) -> Iterator[Callable[[], None]]:
    """What waits until the process is no more."""
    handle = os.pidfd_open(pid)
    try:
        yield lambda: _await_end(handle)
    finally:
        os.close(handle)


def _await_end(handle: int) -> None:
    readable, _, _ = select.select([handle], [], [], 60)
    assert readable, "the process goes on"


async def test_t15_a_picture_that_takes_too_long_is_refused_and_the_next_one_decoded() -> None:
    decoders = Decoders(1, time_s=0.3)
    try:
        [before] = decoders.pids()
        error = await refusal(decoders, many_scans(300, 8192, 8191))
        assert error.kind == "image_load_error" and before not in decoders.pids()
        decoders._time_s = 60
        await still_decodes(decoders)
    finally:
        decoders.close()


async def test_t15_a_process_that_was_killed_is_replaced(decoders: Decoders) -> None:
    await still_decodes(decoders)
    [before] = decoders.pids()
    with ended(before) as wait:
        os.kill(before, signal.SIGKILL)
        wait()
    await still_decodes(decoders)
    assert decoders.pids().isdisjoint({before})


async def test_t15_a_process_killed_at_work_costs_its_picture_only() -> None:
    decoders = Decoders(2, time_s=60)
    try:
        await still_decodes(decoders)
        [before] = decoders.pids()
        lost = asyncio.create_task(answer(decoders, many_scans(2000)))
        while cpu_s(before) < 0.4:  # it has begun
            await asyncio.sleep(0.01)
        beside = decoders.decode(encoded(scene(), "JPEG"))  # in another process
        assert (await beside).size == (SIDE, SIDE)
        os.kill(before, signal.SIGKILL)
        assert isinstance(await lost, AssetError)
        await still_decodes(decoders)
    finally:
        decoders.close()


async def test_t15_the_process_has_little_left_to_do_harm_with(decoders: Decoders) -> None:
    await still_decodes(decoders)
    [pid] = decoders.pids()
    limits = {
        line[:26].strip(): line[26:].split()[1]
        for line in Path(f"/proc/{pid}/limits").read_text().splitlines()
    }
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert limits["Max address space"] == str(child.MEMORY_BYTES)
    assert limits["Max open files"] == str(child.OPEN_FILES)
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {each.split(b"=")[0] for each in environment} <= {
        b"",
        b"PYTHONPATH",
        b"PYTHONHOME",
        b"LD_LIBRARY_PATH",
        b"MALLOC_ARENA_MAX",
        b"MALLOC_MMAP_THRESHOLD_",
    }
    loaded = Path(f"/proc/{pid}/maps").read_text()
    assert "torch" not in loaded and "numpy" not in loaded
    assert len(list(Path(f"/proc/{pid}/fd").iterdir())) <= 4


OWNER = """
import asyncio, sys
from deployments.pictures.decoders import Decoders
from tests.support.hostile_pictures import encoded, many_scans, scene

async def main():
    decoders = Decoders(2, time_s=600)
    await decoders.decode(encoded(scene(), "PNG"))
    busy = asyncio.create_task(decoders.decode(many_scans(2000)))
    while len(decoders.pids()) < 2:  # it has begun
        await decoders.decode(encoded(scene(), "PNG"))
    print(*decoders.pids(), flush=True)
    await busy

asyncio.run(main())
"""


@pytest.fixture
def foster() -> Iterator[None]:
    """Orphans of this process's children become its own, so that it is told how they end."""
    set_child_subreaper = 36
    prctl = ctypes.CDLL(None).prctl
    assert prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    yield
    prctl(set_child_subreaper, 0, 0, 0, 0)


@pytest.mark.usefixtures("foster")
def test_t15_no_process_outlives_the_one_that_has_started_it() -> None:
    root = Path(__file__).parents[3]
    words = [sys.executable, "-c", OWNER]
    owner = subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE)
    with owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        owner.kill()
    for pid in pids:  # one idle, one at work, which would else go on to the end of its time
        with ended(pid) as wait:
            wait()
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
