"""flux/dev against diffusers' own pipeline, and against itself in other company."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.base import Assets
from pipelines.engine.engine import Engine
from pipelines.engine.sample import Sample
from pipelines.flux.flux_dev import Pipeline
from pipelines.flux.model import FluxModel
from pipelines.flux.sampling import Grid, draw_noise, pack
from schemas.endpoints.flux_dev import EXAMPLE, Input
from schemas.errors import InternalError
from schemas.fields import PRESETS, ImageSizePreset
from tests.support.engine import Ears, turn
from tests.support.fields import shows

Denoise = Callable[..., list[Sample]]
DEV = "fal-ai/flux/dev"
SMALL = {"width": 96, "height": 64}


def request(**fields: Any) -> Input:
    return Input.model_validate(
        {"prompt": "a red square", "image_size": SMALL, "num_inference_steps": 4, "seed": 7} | fields
    )


def latents(samples: list[Sample]) -> torch.Tensor:
    return torch.stack([sample.latents for sample in samples])


def run_stock(stock: Any, wish: Input, **options: Any) -> Any:
    assert not isinstance(wish.image_size, ImageSizePreset)
    return stock(
        prompt=wish.prompt,
        width=wish.image_size.width,
        height=wish.image_size.height,
        num_inference_steps=wish.num_inference_steps,
        guidance_scale=wish.guidance_scale,
        max_sequence_length=32,
        **options,
    ).images


@shows(DEV, "num_inference_steps", "guidance_scale")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_inference_steps": 1},
        {"num_inference_steps": 28, "guidance_scale": 1.0},
        {"image_size": {"width": 512, "height": 384}},  # another shift of the schedule
    ],
)
def test_it_matches_stock_diffusers_on_the_same_latents(
    stock: Any, flux_dev: Pipeline, denoise: Denoise, fields: dict[str, Any]
) -> None:
    wish = request(**fields)
    samples = flux_dev.prepare(wish, Assets(), 0).samples
    theirs = run_stock(stock, wish, latents=samples[0].latents[None], output_type="latent")
    ours = latents(denoise(list(samples)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@shows(DEV, "seed", "prompt")
def test_the_same_seed_gives_the_picture_that_diffusers_gives(
    stock: Any, flux_dev: Pipeline, denoise: Denoise
) -> None:
    wish = request()
    [sample] = denoise(list(flux_dev.prepare(wish, Assets(), 0).samples))
    ours = np.asarray(flux_dev.finish(sample)).astype(int)
    [theirs] = run_stock(stock, wish, generator=torch.Generator("cpu").manual_seed(7))
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1


def test_packing_is_that_of_diffusers(stock: Any) -> None:
    noise = torch.randn(1, 16, 8, 12)
    assert torch.equal(stock._pack_latents(noise, 1, 16, 8, 12)[0], pack(noise[0]))


@shows(DEV, "num_images")
def test_image_i_of_n_is_the_single_image_of_seed_plus_i(flux_dev: Pipeline, denoise: Denoise) -> None:
    three = denoise(list(flux_dev.prepare(request(num_images=3), Assets(), 0).samples))
    singles = [denoise(list(flux_dev.prepare(request(seed=7 + i), Assets(), 0).samples))[0] for i in range(3)]
    torch.testing.assert_close(latents(three), latents(singles), atol=1e-5, rtol=0)


def test_a_batch_of_different_requests_equals_their_separate_runs(
    flux_dev: Pipeline, denoise: Denoise
) -> None:
    wishes = [
        request(),
        request(prompt="a blue circle", guidance_scale=9.0, num_inference_steps=6),
        request(seed=1, num_inference_steps=2),
    ]
    together = denoise([flux_dev.prepare(wish, Assets(), 0).samples[0] for wish in wishes])
    alone = [denoise(list(flux_dev.prepare(wish, Assets(), 0).samples))[0] for wish in wishes]
    torch.testing.assert_close(latents(together), latents(alone), atol=1e-5, rtol=0)


def test_a_sample_that_joins_midway_ends_as_it_does_alone(
    flux: FluxModel, flux_dev: Pipeline, denoise: Denoise
) -> None:
    engine = Engine(flux.predict, budget=1 << 20)
    [first] = flux_dev.prepare(request(), Assets(), 0).samples
    [late] = flux_dev.prepare(request(prompt="late", seed=2), Assets(), 0).samples
    engine.add(first, Ears())
    turn(engine)
    turn(engine)
    engine.add(late, Ears())
    while len(engine):
        turn(engine)
    [alone] = denoise(list(flux_dev.prepare(request(prompt="late", seed=2), Assets(), 0).samples))
    torch.testing.assert_close(late.latents, alone.latents, atol=1e-5, rtol=0)


def test_the_same_request_alone_gives_the_same_bytes(flux_dev: Pipeline, denoise: Denoise) -> None:
    runs = [denoise(list(flux_dev.prepare(request(), Assets(), 0).samples)) for _ in range(2)]
    assert torch.equal(latents(runs[0]), latents(runs[1]))


@pytest.mark.parametrize(
    "change",
    [{"prompt": "something else"}, {"seed": 8}, {"guidance_scale": 20.0}, {"num_inference_steps": 5}],
)
def test_every_sampling_field_changes_the_picture(
    flux_dev: Pipeline, denoise: Denoise, change: dict[str, Any]
) -> None:
    plain, changed = (
        denoise(list(flux_dev.prepare(wish, Assets(), 0).samples)) for wish in (request(), request(**change))
    )
    assert not torch.allclose(latents(plain), latents(changed), atol=1e-3)


@pytest.mark.parametrize("preset", list(ImageSizePreset))
def test_presets_give_their_size(flux_dev: Pipeline, preset: ImageSizePreset) -> None:
    [sample] = flux_dev.prepare(request(image_size=preset), Assets(), 0).samples
    assert sample.cost == PRESETS[preset].width * PRESETS[preset].height // 256


@shows(DEV, "image_size.width", "image_size.height")
@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((64, 64), (64, 64)),
        ((79, 65), (64, 64)),  # down to the token grid
        ((1, 1), (16, 16)),  # at least a token
        ((17, 300), (16, 288)),
    ],
)
def test_sizes_round_down_to_sixteen_and_the_picture_has_them(
    flux_dev: Pipeline, denoise: Denoise, asked: tuple[int, int], made: tuple[int, int]
) -> None:
    size = {"width": asked[0], "height": asked[1]}
    [sample] = denoise(list(flux_dev.prepare(request(image_size=size), Assets(), 0).samples))
    assert flux_dev.finish(sample).size == made


def test_a_seed_of_zero_is_a_seed_and_none_is_drawn(flux_dev: Pipeline) -> None:
    assert flux_dev.prepare(request(seed=0), Assets(), 99).seed == 0
    assert flux_dev.prepare(request(seed=None), Assets(), 99).seed == 99


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_the_whole_range_of_seeds_works(flux_dev: Pipeline, seed: int) -> None:
    assert len(flux_dev.prepare(request(seed=seed, num_images=4), Assets(), 0).samples) == 4


def test_noise_does_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(1)
    first = draw_noise(Grid(2, 2), 5)
    torch.manual_seed(2)
    assert torch.equal(first, draw_noise(Grid(2, 2), 5))


def test_a_preview_is_small_and_comes_after_one_step(flux: FluxModel, flux_dev: Pipeline) -> None:
    engine = Engine(flux.predict, budget=1 << 20)
    [sample] = flux_dev.prepare(request(image_size={"width": 1024, "height": 512}), Assets(), 0).samples
    engine.add(sample, Ears())
    turn(engine)
    assert flux_dev.preview(sample).size == (256, 128)


def test_overflowed_numbers_fail_the_sample_instead_of_making_a_black_picture(
    flux_dev: Pipeline, denoise: Denoise
) -> None:
    [sample] = denoise(list(flux_dev.prepare(request(), Assets(), 0).samples))
    sample.latents = replace(sample).latents.clone()
    sample.latents[0, 0] = float("nan")
    with pytest.raises(InternalError, match="overflow"):
        flux_dev.finish(sample)


def test_the_example_of_the_page_is_valid() -> None:
    assert Input.model_validate(EXAMPLE).num_inference_steps == 28
