"""fast-sdxl-controlnet-canny/image-to-image: start picture, edges, LoRAs, and company in a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetImg2ImgPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pipelines import zoo
from pipelines.base import Generation
from pipelines.engine.engine import Engine
from pipelines.preprocess import canny
from pipelines.sd.expand import Expander
from pipelines.sd.fast_sdxl_controlnet_canny_image_to_image import HIGH, LOW, Pipeline
from pipelines.sd.grid import Grid
from pipelines.sd.model import SdModel
from schemas.endpoints.fast_sdxl_controlnet_canny_image_to_image import Input
from schemas.errors import InputError
from schemas.settings import ModelSettings
from tests.support.assets import given
from tests.support.engine import Ears, run_to_end, turn
from tests.support.fields import shows

CANNY = "fal-ai/fast-sdxl-controlnet-canny/image-to-image"
START, CONTROL = "http://pictures/start.png", "http://pictures/control.png"
Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("zoo")
    return {name: zoo.locate(name, root) for name in ("sdxl", "sdxl-canny")}


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> SdModel:
    settings = ModelSettings(
        model=str(folders["sdxl"]), controlnet=str(folders["sdxl-canny"]), endpoints=("any",)
    )
    return SdModel.load(settings, Path)


@pytest.fixture
def remake(model: SdModel) -> Pipeline:
    return Pipeline(model)


def blocks(seed: int, size: tuple[int, int]) -> Image.Image:
    """Large blocks of colour: a picture with edges."""
    colours = np.random.default_rng(seed).integers(0, 255, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def files() -> dict[str, Any]:
    return {
        START: blocks(0, (128, 96)),
        CONTROL: blocks(1, (96, 64)),
        "other edges": blocks(2, (96, 64)).rotate(30),
    }


@pytest.fixture
def lora_files(model: SdModel, tmp_path: Path) -> dict[str, Path]:
    """Two LoRAs on attention layers of the UNet and both text encoders, as peft spells it."""
    found = {}
    for seed, letter in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, (rows, columns, *_) in model.base.targets.items():
            if name.endswith(("to_q", "to_v", "q_proj")):
                tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
                tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
        found[letter] = tmp_path / f"{letter}.safetensors"
        save_file(tensors, found[letter])
    return found


def request(**fields: Any) -> Input:
    known = {
        "prompt": "a red square",
        "image_url": START,
        "control_image_url": CONTROL,
        "num_inference_steps": 4,
        "seed": 7,
    }
    return Input.model_validate(known | fields)


def prepare(remake: Pipeline, wish: Input, files: dict[str, Any]) -> Generation:
    return remake.prepare(wish, given(wish, files), 0)


def finished(model: SdModel, generation: Generation) -> Tensor:
    """[images, 4, rows, columns]"""
    with generation.resources:
        run_to_end(Engine(model.predict, 1 << 20), list(generation.samples))
        return torch.stack([sample.latents for sample in generation.samples])


@pytest.fixture
def run(model: SdModel, remake: Pipeline, files: dict[str, Any]) -> Run:
    def run(more: dict[str, Any] | None = None, **fields: Any) -> Tensor:
        return finished(model, prepare(remake, request(**fields), files | (more or {})))

    return run


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def differ(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 1e-3


@shows(CANNY, "prompt", "image_url", "control_image_url", "controlnet_conditioning_scale", "negative_prompt")
@shows(CANNY, "num_inference_steps", "guidance_scale", "strength", "seed")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"strength": 0.01},
        {"strength": 0.8, "controlnet_conditioning_scale": 1.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "negative_prompt": "blurry", "num_inference_steps": 7, "strength": 0.5},
    ],
)
def test_it_matches_the_stock_pipeline_on_the_same_noise(
    folders: dict[str, Path],
    run: Run,
    files: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
) -> None:
    # the stock pipeline draws from the posterior; we take its mode
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    net = ControlNetModel.from_pretrained(folders["sdxl-canny"])
    stock = StableDiffusionXLControlNetImg2ImgPipeline.from_pretrained(folders["sdxl"], controlnet=net)
    stock.set_progress_bar_config(disable=True)
    wish = request(**fields)
    # with one step of strength 0.01 the stock pipeline returns nothing: the least that leaves a step
    least = 1 / wish.num_inference_steps
    expected = stock(
        prompt=wish.prompt,
        negative_prompt=wish.negative_prompt,
        image=files[START].resize((96, 72), Image.Resampling.LANCZOS).crop((0, 4, 96, 68)),
        control_image=canny(files[CONTROL], LOW, HIGH),
        controlnet_conditioning_scale=wish.controlnet_conditioning_scale,
        strength=max(wish.strength, least),
        num_inference_steps=wish.num_inference_steps,
        guidance_scale=wish.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(7),
        width=96,
        height=64,
        output_type="latent",
    ).images
    close(run(**fields), expected, atol=2e-3)


@shows(CANNY, "controlnet_conditioning_scale")
def test_scale_zero_is_no_control_and_more_scale_acts_more(run: Run) -> None:
    off = run(controlnet_conditioning_scale=0)
    assert torch.equal(off, run(controlnet_conditioning_scale=0, control_image_url="other edges"))
    effects = [(run(controlnet_conditioning_scale=scale) - off).norm() for scale in (0.05, 0.3, 1)]
    assert effects == sorted(effects)
    differ(run(), run(control_image_url="other edges"))


def test_edge_maps_may_come_ready_made(
    folders: dict[str, Path], model: SdModel, files: dict[str, Any]
) -> None:
    settings = ModelSettings(
        model=str(folders["sdxl"]),
        controlnet=str(folders["sdxl-canny"]),
        endpoints=("any",),
        finds_edges=False,
    )
    ready = SdModel.load(settings, Path)
    made = files | {"edges": canny(files[CONTROL], LOW, HIGH)}
    of_edges = finished(ready, prepare(Pipeline(ready), request(control_image_url="edges"), made))
    close(of_edges, finished(model, prepare(Pipeline(model), request(), files)))


@shows(CANNY, "strength")
def test_less_strength_stays_nearer_to_the_start(model: SdModel, run: Run, files: dict[str, Any]) -> None:
    origin = model.base.encode_image(files[START], Grid.of(96, 64))
    distances = [
        (run(strength=strength, num_inference_steps=10)[0] - origin).norm()
        for strength in (0.1, 0.4, 0.7, 1.0)
    ]
    assert distances == sorted(distances)


@shows(CANNY, "negative_prompt", "guidance_scale")
def test_up_to_guidance_one_the_negative_prompt_means_nothing(run: Run) -> None:
    assert torch.equal(run(guidance_scale=0), run(guidance_scale=1, negative_prompt="blue"))
    differ(run(guidance_scale=5), run(guidance_scale=5, negative_prompt="blue"))


@shows(CANNY, "image_size.width", "image_size.height")
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (96, 64)),  # that of the control image
        ({"image_size": {"width": 72, "height": 100}}, (72, 96)),
        ({"image_size": "square"}, (512, 512)),
    ],
)
def test_the_size_is_the_one_asked_for_or_the_control_images(
    model: SdModel, remake: Pipeline, files: dict[str, Any], fields: dict[str, Any], size: tuple[int, int]
) -> None:
    generation = prepare(remake, request(num_inference_steps=1, **fields), files)
    finished(model, generation)
    assert remake.finish(generation.samples[0]).size == size


@shows(CANNY, "num_images")
def test_image_i_of_n_is_the_single_image_of_seed_plus_i(run: Run) -> None:
    close(run(num_images=3), torch.cat([run(seed=7 + i) for i in range(3)]))


@shows(CANNY, "loras.path", "loras.scale")
def test_a_lora_acts_by_its_scale(run: Run, lora_files: dict[str, Path]) -> None:
    def styled(scale: float, path: str = "a") -> Tensor:
        return run(lora_files, loras=[{"path": path, "scale": scale}])

    plain = run()
    assert torch.equal(styled(0), plain)
    effects = [(styled(scale) - plain).norm() for scale in (0.05, 0.3, 1)]
    assert effects == sorted(effects)
    differ(styled(1), styled(1, "b"))


@shows(CANNY, "expand_prompt")
def test_the_prompt_is_written_on_where_there_is_a_model_for_it(
    model: SdModel, remake: Pipeline, files: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = prepare(remake, request(expand_prompt=True), files)
    assert "not expanded" in without.notes[0]
    assert torch.equal(finished(model, without), run())

    class Wordy(Expander):
        def __init__(self) -> None:
            pass

        def expand(self, prompt: str, seed: int) -> str:
            return f"{prompt} of colour {seed}"

    monkeypatch.setattr(model, "expander", Wordy())
    expanded = prepare(remake, request(expand_prompt=True), files)
    assert expanded.notes == ()
    assert torch.equal(finished(model, expanded), run(prompt="a red square of colour 7"))


def test_a_batch_of_different_requests_equals_separate_runs(
    model: SdModel, remake: Pipeline, files: dict[str, Any], lora_files: dict[str, Path]
) -> None:
    wishes = [
        request(loras=[{"path": "a", "scale": 0.8}]),
        request(loras=[{"path": "b"}, {"path": "a", "scale": 0.3}], strength=0.5, seed=2, guidance_scale=1),
        request(num_inference_steps=7, guidance_scale=9.0, controlnet_conditioning_scale=0),
        request(prompt="plain", negative_prompt="blue", controlnet_conditioning_scale=0.9),
    ]

    def prepared() -> list[Generation]:
        return [prepare(remake, wish, files | lora_files) for wish in wishes]

    together = prepared()
    run_to_end(Engine(model.predict, 1 << 20), [s for each in together for s in each.samples])
    for generation in together:
        generation.resources.close()
    for mixed, alone in zip(together, prepared(), strict=True):
        close(mixed.samples[0].latents[None], finished(model, alone), atol=5e-5)


def test_a_sample_that_joins_midway_ends_as_it_does_alone(
    model: SdModel, remake: Pipeline, files: dict[str, Any], run: Run
) -> None:
    engine = Engine(model.predict, 1 << 20)
    [first] = prepare(remake, request(num_inference_steps=6), files).samples
    [late] = prepare(remake, request(seed=2), files).samples
    engine.add(first, Ears())
    turn(engine)
    turn(engine)
    engine.add(late, Ears())
    while len(engine):
        turn(engine)
    close(late.latents[None], run(seed=2), atol=5e-5)


def test_a_preview_is_small(model: SdModel, remake: Pipeline, files: dict[str, Any]) -> None:
    [sample] = prepare(remake, request(image_size="square"), files).samples
    engine = Engine(model.predict, 1 << 20)
    engine.add(sample, Ears())
    turn(engine)
    assert remake.preview(sample).size == (256, 256)


def test_a_flux_lora_is_refused_with_the_path_of_its_field(
    remake: Pipeline, files: dict[str, Any], tmp_path: Path
) -> None:
    alien = tmp_path / "flux.safetensors"
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}, alien)
    with pytest.raises(InputError) as raised:
        prepare(remake, request(loras=[{"path": "flux"}]), files | {"flux": alien})
    assert raised.value.fields[0].loc == ("body", "loras", 0, "path")
    assert remake.model.base._bank.pins == 0
