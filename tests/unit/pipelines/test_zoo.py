"""The embedded models are real, repeatable, and safe to build from several sides at once."""

import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from pipelines import zoo

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def flux(root: Path) -> Any:
    return load_flux(zoo.locate("flux", root))


def load_flux(folder: Path) -> Any:
    pipeline = FluxPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str = "a red fox", guidance_scale: float = 3.5) -> Pixels:
    output = pipeline(
        prompt,
        guidance_scale=guidance_scale,
        width=64,
        height=64,
        num_inference_steps=2,
        max_sequence_length=32,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
    )
    assert np.isfinite(output.images).all()
    picture: Pixels = (output.images[0] * 255).round().astype(np.uint8)
    return picture


def difference(one: Pixels, other: Pixels) -> float:
    """Mean distance per channel, of 255."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_flux_draws_the_same_pixels_after_a_second_load(root: Path, flux: Any) -> None:
    again = load_flux(zoo.locate("flux", root))

    assert np.array_equal(draw(flux), draw(again))


def test_a_flux_picture_is_not_flat(flux: Any) -> None:
    picture = draw(flux)

    assert picture.shape == (64, 64, 3)
    assert (picture.std(axis=(0, 1)) > 20).all()  # every channel, so not a shade of one colour
    assert difference(picture[..., 0], picture[..., 2]) > 10  # nor grey


def test_the_prompt_changes_the_picture(flux: Any) -> None:
    assert difference(draw(flux, "a red fox"), draw(flux, "a blue boat at sea")) > 20


def test_the_guidance_changes_the_picture(flux: Any) -> None:
    assert difference(draw(flux, guidance_scale=3.5), draw(flux, guidance_scale=7.0)) > 0.5


def test_flux_keeps_the_shapes_its_users_rely_on(flux: Any) -> None:
    assert flux.vae_scale_factor == 8
    assert flux.vae.config.latent_channels == 16
    assert flux.transformer.config.guidance_embeds
    assert flux.scheduler.config.use_dynamic_shifting
    assert flux.tokenizer.model_max_length == 77
    assert flux.tokenizer_2.model_max_length == 512
    assert flux.tokenizer.eos_token_id == max(flux.tokenizer.get_vocab().values())


@pytest.mark.parametrize("name", zoo.names())
def test_two_builds_write_the_same_bytes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)  # builds do not depend on what was drawn before
    first = contents(zoo.locate(name, tmp_path / "first"))

    torch.manual_seed(2)
    assert contents(zoo.locate(name, tmp_path / "second")) == first


@pytest.mark.parametrize("name", zoo.names())
def test_a_build_leaves_the_global_random_state_alone(name: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    zoo.locate(name, tmp_path)

    assert torch.equal(torch.get_rng_state(), before)


def test_a_build_tells_its_stages_and_a_second_call_is_silent(tmp_path: Path) -> None:
    lines: list[str] = []
    zoo.locate("flux", tmp_path, lines.append)
    assert "embedded flux: building the transformer" in lines

    lines.clear()
    zoo.locate("flux", tmp_path, lines.append)
    assert lines == []


def test_a_build_that_loses_the_race_yields_to_the_winner(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / zoo.locate("flux", root).name

    def another_process_publishes(stage: str) -> None:
        if stage == "embedded flux: saving":
            shutil.copytree(root / folder.name, folder)
            (folder / "winner").touch()

    assert zoo.locate("flux", tmp_path, another_process_publishes) == folder
    assert (folder / "winner").exists()
    assert list(tmp_path.iterdir()) == [folder]
    load_flux(folder)


def test_threads_that_ask_together_share_one_build(tmp_path: Path) -> None:
    lines: list[str] = []
    with ThreadPoolExecutor(4) as threads:
        locate = partial(zoo.locate, root=tmp_path, report=lines.append)
        folders = set(threads.map(locate, ["safety-checker"] * 4))

    assert set(tmp_path.iterdir()) == folders
    assert lines.count("embedded safety-checker: saving") == 1


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def stop(stage: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.locate("flux", tmp_path, stop)
    assert list(tmp_path.iterdir()) == []


def test_models_live_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert zoo.locate("safety-checker").parent == tmp_path / "darkroom" / "zoo"


def test_an_unknown_name_is_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'fluks'; known: flux, flux-redux, .*, sdxl-canny, flux-world"):
        zoo.locate("fluks", tmp_path)


SD = {"sd15": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def stock(root: Path) -> dict[str, Any]:
    """diffusers' pipelines on the embedded Stable Diffusion models."""
    return {name: load_sd(kind, zoo.locate(name, root)) for name, kind in SD.items()}


def load_sd(kind: Any, folder: Path) -> Any:
    own = {} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    pipeline = kind.from_pretrained(folder, local_files_only=True, **own)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_sd(pipeline: Any, prompt: str = "a red fox", seed: int = 7, **more: Any) -> Pixels:
    generator = torch.Generator("cpu").manual_seed(seed)
    asked = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 7.5} | more
    output = pipeline(prompt, generator=generator, output_type="np", **asked)
    assert np.isfinite(output.images).all()
    picture: Pixels = (output.images[0] * 255).round().astype(np.uint8)
    return picture


@pytest.mark.parametrize("name", SD)
def test_stable_diffusion_draws_the_same_pixels_after_a_second_load(
    name: str, root: Path, stock: dict[str, Any]
) -> None:
    again = load_sd(SD[name], zoo.locate(name, root))

    assert np.array_equal(draw_sd(stock[name]), draw_sd(again))


@pytest.mark.parametrize("name", SD)
def test_a_stable_diffusion_picture_is_not_flat_and_follows_what_is_asked(
    name: str, stock: dict[str, Any]
) -> None:
    picture = draw_sd(stock[name])

    assert picture.shape == (64, 64, 3)
    assert (picture.std(axis=(0, 1)) > 20).all()
    assert difference(picture[..., 0], picture[..., 2]) > 10
    assert difference(picture, draw_sd(stock[name], "a blue boat at sea")) > 15
    assert difference(picture, draw_sd(stock[name], seed=8)) > 25
    assert difference(picture, draw_sd(stock[name], guidance_scale=5.0)) > 3


def test_stable_diffusions_kinds_differ_as_the_real_ones_do(stock: dict[str, Any]) -> None:
    first, second, large = (stock[name] for name in SD)

    assert [each.unet.config.cross_attention_dim for each in (first, second, large)] == [32, 48, 64]
    assert [each.unet.config.use_linear_projection for each in (first, second, large)] == [False, True, True]
    assert large.unet.config.addition_embed_type == "text_time"
    predictions = [each.scheduler.config.prediction_type for each in (first, second, large)]
    assert predictions == ["epsilon", "v_prediction", "epsilon"]
    pads = [first.tokenizer, second.tokenizer, large.tokenizer, large.tokenizer_2]
    assert [each.pad_token_id for each in pads] == [513, 0, 513, 0]
    assert {each.vae_scale_factor for each in (first, second, large)} == {8}
    assert {each.vae.config.latent_channels for each in (first, second, large)} == {4}


def test_the_controlnet_follows_its_picture(root: Path, stock: dict[str, Any]) -> None:
    net = ControlNetModel.from_pretrained(zoo.locate("sdxl-canny", root), local_files_only=True)
    guided = StableDiffusionXLControlNetPipeline(
        **stock["sdxl"].components, controlnet=net, add_watermarker=False
    )
    guided.set_progress_bar_config(disable=True)
    edges = np.zeros((2, 64, 64, 3), np.uint8)
    edges[0, 16:48, [16, 47]] = edges[0, [16, 47], 16:48] = 255  # a box
    edges[1, 32] = edges[1, :, 32] = 255  # a cross
    box, cross = (Image.fromarray(each) for each in edges)
    free = draw_sd(stock["sdxl"])

    assert np.array_equal(draw_sd(guided, image=box, controlnet_conditioning_scale=0.0), free)
    assert difference(draw_sd(guided, image=box), free) > 15
    assert difference(draw_sd(guided, image=box), draw_sd(guided, image=cross)) > 15


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, pipelines.zoo; print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(zoo.__file__).parents[2],
        capture_output=True,
        check=True,
    )

    assert answer.stdout.strip() == b"False"


def judge(root: Path, threshold: float | None = None) -> tuple[list[Pixels], list[bool]]:
    """What comes out of the checker for three pictures; `threshold` replaces every concept's."""
    folder = zoo.locate("safety-checker", root)
    checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker", local_files_only=True)
    processor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)
    if threshold is not None:
        checker.concept_embeds_weights.data.fill_(threshold)
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    pictures = [noise, np.full_like(noise, 255), np.zeros_like(noise)]
    seen = processor(images=pictures, return_tensors="pt").pixel_values
    judged, flags = checker(clip_input=seen, images=list(pictures))
    return judged, flags


def test_the_safety_checker_flags_nothing(root: Path) -> None:
    pictures, flags = judge(root)

    assert flags == [False, False, False]
    assert pictures[1].all()


def test_a_safety_checker_with_the_lowest_thresholds_flags_everything(root: Path) -> None:
    pictures, flags = judge(root, threshold=-9)

    assert flags == [True, True, True]
    assert not any(picture.any() for picture in pictures)


def test_a_trained_model_lies_in_the_package_and_is_not_built(tmp_path: Path) -> None:
    lines: list[str] = []

    assert zoo.locate("flux-world", tmp_path, lines.append) == zoo.WEIGHTS / "flux-world"
    assert lines == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_shipped_is_small_and_in_float16() -> None:
    files = [path for path in zoo.WEIGHTS.rglob("*") if path.is_file()]

    assert sum(path.stat().st_size for path in files) < 40e6
    for path in zoo.WEIGHTS.rglob("*.safetensors"):
        kinds = {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()}
        assert kinds == {torch.float16}


def test_an_installed_package_has_the_weights() -> None:
    settings = tomllib.loads((zoo.WEIGHTS.parents[2] / "pyproject.toml").read_text())
    [pattern] = settings["tool"]["setuptools"]["package-data"]["pipelines.zoo"]
    package = zoo.WEIGHTS.parent
    carried = set(package.glob(pattern))

    assert {path for path in zoo.WEIGHTS.rglob("*") if path.is_file()} <= carried
