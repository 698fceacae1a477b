"""Pictures that end together are decoded together, and are those that they are alone."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.base import Generation
from pipelines.decoding import Decoding
from pipelines.sd.base import plan_of
from tests.support.universal import START, Studio, blocks, close

Fault = Callable[[], None]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    made = Studio(tmp_path_factory.mktemp("studio"))
    made.files |= {"small": blocks(3, (96, 64)), "tall": blocks(4, (64, 96))}
    return made


@pytest.fixture
def ended(studio: Studio) -> list[Generation]:
    """Requests of two models and two sizes, one of them for two pictures."""
    wishes: list[dict[str, Any]] = [
        {"image_url": "small"},
        {"image_url": "small", "seed": 8, "num_images": 2},
        {"image_url": "tall", "model_name": "sd2"},
        {"image_url": "small", "model_name": "sd2"},
        {"image_url": "tall", "model_name": "sd2", "seed": 9},
        {"image_url": START, "prompt": "blue"},
    ]
    found = [studio.prepare(**wish) for wish in wishes]
    for each in found:
        studio.finish(each)
    return found


@pytest.fixture
def calls(studio: Studio, ended: list[Generation]) -> Iterator[list[int]]:
    """How many pictures each call of a VAE decodes."""
    seen: list[int] = []
    bases = {plan_of(each.samples[0]).base for each in ended}
    hooks = [
        base._parts.vae.decoder.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
        for base in bases
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def pixels_of(studio: Studio, generations: list[Generation]) -> list[Tensor | None]:
    decoding = Decoding()
    waiting = [decoding.add(studio.pipe, each) for each in generations]
    return [decoding.pixels(each).get(sample) for each in waiting for sample in each.generation.samples]


def test_those_of_one_model_and_size_share_a_call_and_keep_their_pictures(
    studio: Studio, ended: list[Generation], calls: list[int]
) -> None:
    found = pixels_of(studio, ended)
    samples = [sample for each in ended for sample in each.samples]
    assert calls[0] >= 3
    assert sum(calls) == sum(each is not None for each in found)
    for sample, pixels in zip(samples, found, strict=True):
        if pixels is not None:
            close(pixels, plan_of(sample).base.decode(sample.latents))


def test_one_alone_is_decoded_as_ever(studio: Studio, ended: list[Generation], calls: list[int]) -> None:
    assert pixels_of(studio, ended[1:2]) == [None, None]
    assert not calls


@pytest.mark.parametrize("side", [64, 65, 128])
def test_large_ones_are_not_worth_it(
    studio: Studio, ended: list[Generation], calls: list[int], side: int
) -> None:
    for each in ended[:2]:
        for sample in each.samples:
            sample.latents = torch.zeros(4, side, side)
    assert pixels_of(studio, ended[:2]) == [None] * 3
    assert not calls


def test_t30_numbers_that_are_none_are_decoded_with_nobody(
    studio: Studio, ended: list[Generation], calls: list[int]
) -> None:
    ended[0].samples[0].latents = torch.full((4, 8, 12), torch.nan)
    found = pixels_of(studio, ended[:2])
    assert found[0] is None
    assert calls == [2]


def no_cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_memory() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


@pytest.mark.parametrize("fault", [no_cuda_memory, no_memory])
def test_t29_without_memory_for_all_each_is_decoded_alone(
    studio: Studio, ended: list[Generation], fault: Fault
) -> None:
    hook = studio.model.base._parts.vae.decoder.register_forward_pre_hook(lambda module, given: fault())
    try:
        assert pixels_of(studio, ended[:2]) == [None] * 3
    finally:
        hook.remove()


def test_what_was_dropped_is_not_decoded(studio: Studio, ended: list[Generation], calls: list[int]) -> None:
    decoding = Decoding()
    gone, stays, other = (decoding.add(studio.pipe, each) for each in [ended[1], ended[0], ended[5]])
    decoding.drop(gone)
    decoding.pixels(stays)
    decoding.drop(stays)
    decoding.pixels(other)
    assert sum(calls) <= 2
