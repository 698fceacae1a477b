"""flux-lora/image-to-image: the start picture, the LoRAs, and company in a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from pipelines.base import Assets, Generation
from pipelines.engine.sample import Sample
from pipelines.flux import flux_dev
from pipelines.flux.flux_lora_image_to_image import Pipeline
from pipelines.flux.model import FluxModel
from schemas.endpoints import flux_dev as flux_dev_schema
from schemas.endpoints.flux_lora_image_to_image import Input
from schemas.errors import InputError
from tests.support.assets import given
from tests.support.fields import shows
from tests.support.loras import write_lora

Denoise = Callable[..., list[Sample]]
REMAKE = "fal-ai/flux-lora/image-to-image"
URL = "http://pictures/start.png"


@pytest.fixture(scope="session")
def remake(flux: FluxModel) -> Pipeline:
    return Pipeline(flux)


def request(**fields: Any) -> Input:
    known = {"prompt": "a red square", "image_url": URL, "num_inference_steps": 4, "seed": 7}
    return Input.model_validate(known | fields)


def prepare(
    remake: Pipeline, start: Image.Image, wish: Input, weights: dict[str, Path] | None = None
) -> Generation:
    return remake.prepare(wish, given(wish, {URL: start, **(weights or {})}), 0)


def finished(denoise: Denoise, generation: Generation) -> torch.Tensor:
    with generation.resources:
        return torch.stack([sample.latents for sample in denoise(list(generation.samples))])


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@shows(REMAKE, "image_url", "strength")
@pytest.mark.parametrize("strength", [0.01, 0.3, 0.85, 1.0])
def test_it_matches_stock_image_to_image(
    stock: Any,
    remake: Pipeline,
    start: Image.Image,
    denoise: Denoise,
    monkeypatch: pytest.MonkeyPatch,
    strength: float,
) -> None:
    # the stock pipeline draws from the posterior; we take its mode
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    theirs = FluxImg2ImgPipeline(**stock.components)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompt="a red square",
        image=start,
        width=96,
        height=64,
        strength=strength,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=32,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="latent",
    ).images
    ours = finished(denoise, prepare(remake, start, request(strength=strength)))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


@shows(REMAKE, "prompt", "seed", "num_inference_steps", "guidance_scale")
def test_strength_one_is_text_to_image_on_the_same_noise(
    flux: FluxModel, remake: Pipeline, start: Image.Image, denoise: Denoise
) -> None:
    plain = flux_dev_schema.Input(
        prompt="a red square",
        image_size={"width": 96, "height": 64},
        num_inference_steps=4,
        seed=7,
    )
    text_to_image = flux_dev.Pipeline(flux).prepare(plain, Assets(), 0)
    remade = prepare(remake, start, request(strength=1))
    assert torch.equal(finished(denoise, remade), finished(denoise, text_to_image))


def test_less_strength_stays_nearer_to_the_start(
    flux: FluxModel, remake: Pipeline, start: Image.Image, denoise: Denoise
) -> None:
    distances = []
    for strength in (0.1, 0.4, 0.7, 1.0):
        generation = prepare(remake, start, request(strength=strength, num_inference_steps=10))
        grid = generation.samples[0].plan.grid  # type: ignore[attr-defined]
        origin = flux.encode_image(start, grid)
        distances.append((finished(denoise, generation)[0] - origin).norm().item())
    assert distances == sorted(distances)


@shows(REMAKE, "image_size.width", "image_size.height")
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (96, 64)),  # that of the start picture
        ({"image_size": None}, (96, 64)),
        ({"image_size": {"width": 64, "height": 64}}, (64, 64)),
        ({"image_size": "square"}, (512, 512)),
    ],
)
def test_the_size_is_the_one_asked_for_or_the_start_pictures(
    remake: Pipeline, start: Image.Image, denoise: Denoise, fields: dict[str, Any], size: tuple[int, int]
) -> None:
    generation = prepare(remake, start, request(num_inference_steps=1, **fields))
    [sample] = denoise(list(generation.samples))
    assert remake.finish(sample).size == size


def test_a_start_picture_beyond_the_limit_is_scaled_down_in_proportion(remake: Pipeline) -> None:
    huge = Image.new("RGB", (8000, 4000))
    grid = remake._grid(request(), None, huge)
    assert grid.width * grid.height <= remake.model.limits.max_pixels
    assert abs(grid.width / grid.height - 2) < 0.02


@shows(REMAKE, "loras.path", "loras.scale")
def test_scale_zero_is_no_lora_to_the_bit(
    remake: Pipeline, start: Image.Image, denoise: Denoise, lora_files: dict[str, Path]
) -> None:
    off = request(loras=[{"path": "a", "scale": 0}])
    plain = finished(denoise, prepare(remake, start, request()))
    assert torch.equal(finished(denoise, prepare(remake, start, off, lora_files)), plain)


@shows(REMAKE, "loras.path", "loras.scale")
def test_a_lora_acts_more_the_larger_its_scale(
    remake: Pipeline, start: Image.Image, denoise: Denoise, lora_files: dict[str, Path]
) -> None:
    plain = finished(denoise, prepare(remake, start, request()))
    effects = [
        (finished(denoise, prepare(remake, start, wish, lora_files)) - plain).norm().item()
        for wish in (request(loras=[{"path": "a", "scale": scale}]) for scale in (0.01, 0.1, 1))
    ]
    assert 0 < effects[0] < effects[1] < effects[2]


@shows(REMAKE, "num_images")
def test_image_i_of_n_is_the_single_image_of_seed_plus_i(
    remake: Pipeline, start: Image.Image, denoise: Denoise
) -> None:
    three = finished(denoise, prepare(remake, start, request(num_images=3)))
    singles = [finished(denoise, prepare(remake, start, request(seed=7 + i))) for i in range(3)]
    close(three, torch.cat(singles))


def test_a_batch_of_different_loras_and_endpoints_equals_separate_runs(
    flux: FluxModel,
    remake: Pipeline,
    start: Image.Image,
    denoise: Denoise,
    lora_files: dict[str, Path],
) -> None:
    plain = flux_dev_schema.Input(
        prompt="plain", image_size={"width": 96, "height": 64}, num_inference_steps=3, seed=1
    )
    wishes = [
        request(loras=[{"path": "a", "scale": 0.8}]),
        request(loras=[{"path": "b"}, {"path": "a", "scale": 0.3}], strength=0.5, seed=2),
        request(num_inference_steps=7, guidance_scale=9.0),
    ]

    def prepared() -> list[Generation]:
        remade = [prepare(remake, start, wish, lora_files) for wish in wishes]
        return [*remade, flux_dev.Pipeline(flux).prepare(plain, Assets(), 0)]

    together = prepared()
    denoise([sample for generation in together for sample in generation.samples])
    for generation in together:
        generation.resources.close()
    for mixed, alone in zip(together, prepared(), strict=True):
        close(mixed.samples[0].latents[None], finished(denoise, alone))


def test_a_lora_is_given_back_when_the_request_is_done(
    flux: FluxModel, remake: Pipeline, start: Image.Image, lora_files: dict[str, Path]
) -> None:
    generation = prepare(remake, start, request(loras=[{"path": "a"}]), lora_files)
    assert flux._bank.pins == flux._text_bank.pins == 1
    generation.resources.close()
    assert flux._bank.pins == flux._text_bank.pins == 0


def test_a_bad_lora_is_refused_with_the_path_of_its_field(
    flux: FluxModel, remake: Pipeline, start: Image.Image, lora_files: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.safetensors"
    page.write_text("<!doctype html><title>Sign in</title>")
    wish = request(loras=[{"path": "a"}, {"path": "page"}])
    with pytest.raises(InputError) as raised:
        prepare(remake, start, wish, lora_files | {"page": page})
    assert raised.value.fields[0].loc == ("body", "loras", 1, "path")
    assert flux._bank.pins == 0


def test_loras_beyond_the_bank_are_refused_together(
    flux: FluxModel, remake: Pipeline, start: Image.Image, tmp_path: Path
) -> None:
    files = {str(n): write_lora(flux, tmp_path / f"{n}.safetensors", n, rank=60) for n in range(3)}
    wish = request(loras=[{"path": name} for name in files])
    with pytest.raises(InputError) as raised:
        prepare(remake, start, wish, files)
    assert raised.value.fields[0].loc == ("body", "loras")
