"""A worker whose model runs out of memory or numbers on one of many requests, or that loses its device."""

import asyncio
import base64
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deployments.files.store import open_files
from deployments.worker.worker import DEVICE_LOST, Worker
from pipelines.engine.device import is_lost
from schemas.jobs import JobResult
from schemas.settings import ModelSettings
from tests.support.jobs import ENDPOINT, make_job

FIELDS = {
    "prompt": "x",
    "image_size": {"width": 64, "height": 48},
    "num_inference_steps": 3,
    "sync_mode": True,
}
ODD = 9.0  # the guidance scale by which a fault knows its request
PEBIBYTE = 1 << 50
Fault = Callable[[], None]


def no_cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_memory() -> None:
    torch.empty(PEBIBYTE, dtype=torch.uint8)


EVERY_FAULT = pytest.mark.parametrize("fault", [no_cuda_memory, no_memory])


@pytest.fixture(scope="module")
def worker(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    settings = ModelSettings(
        model=str(flux_folder), endpoints=(ENDPOINT,), max_sequence_length=32, cpu_threads=1, concurrency=8
    )
    made = Worker(settings, open_files(f"file://{tmp_path_factory.mktemp('files')}"))
    yield made
    made.close()


def part(worker: Worker, name: str) -> nn.Module:
    found: nn.Module = getattr(worker._pipelines[ENDPOINT].model._parts, name)
    return found


async def result(worker: Worker, **fields: Any) -> JobResult:
    *_, last = [update async for update in worker.generate(make_job(input=FIELDS | fields))]
    assert last.result is not None
    return last.result


async def eight(worker: Worker, odd: int) -> list[JobResult]:
    """Eight requests at once, number `odd` with the odd guidance."""
    wishes: list[dict[str, Any]] = [{"seed": seed} for seed in range(8)]
    wishes[odd]["guidance_scale"] = ODD
    return await asyncio.gather(*(result(worker, **wish) for wish in wishes))


def pictures(results: list[JobResult]) -> list[Any]:
    """Of each result, [height, width, 3]."""
    found = []
    for each in results:
        [image] = each.output()["images"]
        data = base64.b64decode(image["url"].partition(",")[2])
        found.append(np.asarray(Image.open(io.BytesIO(data))).astype(int))
    return found


def same(some: list[Any], others: list[Any]) -> bool:
    """But for rounding, seen through JPEG; pictures of other seeds differ by more than 20."""
    return all(np.abs(one - other).mean() < 0.1 for one, other in zip(some, others, strict=True))


@contextmanager
def before_forwards(module: nn.Module, call: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """`call` is given the arguments of each forward before it begins."""
    hook = module.register_forward_pre_hook(lambda module, args, given: call(given), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def told(result: JobResult) -> tuple[int, str | None, str]:
    return result.status, result.error_type, result.body["detail"][0]["type"]


@EVERY_FAULT
async def test_t29_of_eight_requests_in_a_batch_the_one_without_memory_fails_alone(
    worker: Worker, fault: Fault
) -> None:
    expected = pictures(await eight(worker, odd=3))
    forwards: list[int] = []

    def strained(given: dict[str, Any]) -> None:
        forwards.append(len(given["guidance"]))
        if ODD in given["guidance"].tolist():
            fault()

    pid = os.getpid()
    with before_forwards(part(worker, "transformer"), strained):
        results = await eight(worker, odd=3)
    failed = results.pop(3)
    assert told(failed) == (500, "out_of_memory", "out_of_memory")
    assert "smaller size" in failed.body["message"] and "fewer images" in failed.body["message"]
    assert same(pictures(results), expected[:3] + expected[4:])
    assert len(forwards) <= 7 * 3 + 2 * 7  # each alone at the worst, and a second try of each part
    assert pid == os.getpid()
    worker.check_health()
    assert same(pictures(await eight(worker, odd=3)), expected)


@EVERY_FAULT
async def test_t29_a_batch_that_is_too_large_costs_nobody_a_picture(worker: Worker, fault: Fault) -> None:
    expected = pictures(await eight(worker, odd=0))

    def small(given: dict[str, Any]) -> None:
        if len(given["guidance"]) > 3:
            fault()

    with before_forwards(part(worker, "transformer"), small):
        assert same(pictures(await eight(worker, odd=0)), expected)


@EVERY_FAULT
@pytest.mark.parametrize("place", ["text_encoder_2", "vae.decoder"])
async def test_t29_without_memory_before_or_after_the_steps_a_request_fails_with_its_own_error(
    worker: Worker, fault: Fault, place: str
) -> None:
    wish = {"seed": 1, "prompt": f"{place} {fault.__name__}"}  # texts that are known are not encoded
    name, _, inner = place.partition(".")
    module = part(worker, name).get_submodule(inner)
    calls: list[int] = []

    def full(given: dict[str, Any]) -> None:
        calls.append(1)
        fault()

    def full_once(given: dict[str, Any]) -> None:
        if not calls:
            full(given)

    with before_forwards(module, full):
        assert told(await result(worker, **wish)) == (500, "out_of_memory", "out_of_memory")
    assert len(calls) == 2
    calls.clear()
    with before_forwards(module, full_once):
        assert (await result(worker, **wish)).status == 200
    worker.check_health()
    assert (await result(worker, **wish)).status == 200


@EVERY_FAULT
async def test_t29_without_memory_for_what_is_loaded_a_request_fails_with_its_own_error(
    worker: Worker, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(worker._pipelines[ENDPOINT], "hold", lambda *_: fault())
        assert told(await result(worker)) == (500, "out_of_memory", "out_of_memory")
    assert (await result(worker)).status == 200


@pytest.mark.parametrize("step", [0, 1, 2])
async def test_t30_numbers_that_are_none_fail_their_request_and_no_other(worker: Worker, step: int) -> None:
    expected = pictures(await eight(worker, odd=5))
    transformer, seen = part(worker, "transformer"), 0

    def spoilt(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> Any:
        nonlocal seen
        for row, guidance in enumerate(given["guidance"].tolist()):
            if guidance == ODD:
                if seen == step:
                    output[0][row] = torch.nan
                seen += 1
        return output

    hook = transformer.register_forward_hook(spoilt, with_kwargs=True)
    results = await eight(worker, odd=5)
    hook.remove()
    failed = results.pop(5)
    assert told(failed) == (500, "not_finite", "not_finite")
    assert "overflowed" in failed.body["message"]
    assert same(pictures(results), expected[:5] + expected[6:])
    assert same(pictures(await eight(worker, odd=5)), expected)


async def test_t30_pixels_that_are_none_are_no_black_picture(worker: Worker) -> None:
    decoder = part(worker, "vae").get_submodule("decoder")
    hook = decoder.register_forward_hook(lambda module, args, output: output * torch.nan)
    failed = await result(worker)
    hook.remove()
    assert told(failed) == (500, "not_finite", "not_finite")
    assert (await result(worker)).status == 200


async def test_t30_a_preview_that_cannot_be_made_costs_no_picture(worker: Worker) -> None:
    decoder, calls = part(worker, "vae").get_submodule("decoder"), 0

    def spoilt_once(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return output * torch.nan if calls == 1 else output

    hook = decoder.register_forward_hook(spoilt_once)
    job = make_job(input=FIELDS, previews=True)
    *_, last = [update async for update in worker.generate(job)]
    hook.remove()
    assert calls >= 2
    assert last.result is not None and last.result.status == 200


class Exited(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("place", ["transformer", "text_encoder_2"])
async def test_a_replica_whose_device_is_lost_ends_and_fails_no_request(
    worker: Worker, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would answer each that comes with a 500, faster than any other replica has a picture."""
    codes: list[int] = []

    def exits(code: int) -> None:
        codes.append(code)
        raise Exited

    def lost(given: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch, before_forwards(part(worker, place), lost):
        patch.setattr(os, "_exit", exits)
        failed = await result(worker, prompt=f"a fault of the {place}")  # the device still computes
        assert told(failed) == (500, "internal_server_error", "internal_server_error") and not codes
        patch.setattr(torch, "ones", lambda *_, **__: lost(None))
        with pytest.raises(Exited):
            await result(worker, prompt=f"a fault of the {place}")
    assert codes == [DEVICE_LOST]
    assert (await result(worker)).status == 200


def test_a_device_without_memory_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_lost("cpu")
    monkeypatch.setattr(torch, "ones", lambda *_, **__: no_cuda_memory())
    assert not is_lost("cpu")
