"""What a model takes of a GPU, told before it is loaded, against what it takes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines import zoo
from pipelines.footprint import components, decode_bytes, forward_bytes
from pipelines.live import peak_bytes
from pipelines.pacing import probes
from pipelines.placement import GIB, Part, Placement, placed
from pipelines.registry import ENDPOINTS
from pipelines.sources import locate
from schemas.errors import NoRoom
from schemas.settings import Limits, ModelSettings, SpeedSettings

FAMILIES = {"flux": "fal-ai/flux/dev", "sdxl": "fal-ai/fast-sdxl-controlnet-canny/image-to-image"}
EVERY = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def settings(name: str, flux_folder: Path) -> ModelSettings:
    return ModelSettings(
        model=str(zoo.locate(name, flux_folder.parent)),
        controlnet=str(zoo.locate("sdxl-canny", flux_folder.parent)) if name == "sdxl" else None,
        endpoints=(FAMILIES[name],),
        max_sequence_length=32,
        limits=Limits(max_pixels=512 * 512),
        batch_tokens=2048,
    )


def parts(settings: ModelSettings) -> dict[str, int | None]:
    found = placed(settings, locate)
    weights, peaks = ({each.name: each.nbytes for each in part} for part in (found.weights, found.peaks))
    return weights | {f"peak of {name}": nbytes for name, nbytes in peaks.items()}


def modules(model: Any) -> dict[str, nn.Module]:
    """The components of a loaded model."""
    held = model._parts if hasattr(model, "_parts") else model.base._parts
    if hasattr(held, "transformer"):
        return {
            name: getattr(held, name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
        }
    first, second = held.text_encoders
    return {"unet": held.unet, "vae": held.vae, "text_encoder": first, "text_encoder_2": second}


@EVERY
def test_weights_and_peaks_are_told_as_they_are(name: str, settings: ModelSettings) -> None:
    """The peaks to a tenth: a step of ours keeps a little beside the model's own forward."""
    told = parts(settings)
    endpoint = ENDPOINTS[FAMILIES[name]]
    kind = endpoint.pipeline().Pipeline
    model = kind.model_type.load(settings, Path)
    loaded = modules(model)
    for part, module in loaded.items():
        assert told[f"model/{part}"] == sum(each.nbytes for each in module.parameters())
    decoder = loaded.pop("vae")
    count = {"flux": 2, "sdxl": 1}[name]  # guidance makes two rows of one sample
    with probes(kind(model), endpoint.schema(), settings, sides=(512,)) as [sample]:
        rows = [sample] * count
        beside = [model.controlnet] if name == "sdxl" else []
        step = peak_bytes(lambda: model.predict(rows), [*loaded.values(), *beside])
        decoded = peak_bytes(lambda: kind(model).finish(sample), [decoder])
    assert (told["peak of forward"] or 0) + (told.get("peak of controlnet") or 0) == pytest.approx(
        step, rel=0.1
    )
    assert told["peak of decode"] == pytest.approx(decoded, rel=0.1)


def test_rows_and_pixels_cost_in_proportion(flux_folder: Path) -> None:
    parts = {each.name: each for each in components(flux_folder)}
    one, four = (forward_bytes(parts["transformer"], torch.bfloat16, n, 32) for n in (1024, 4096))
    assert four == pytest.approx(4 * one, rel=0.1)
    small, large = (decode_bytes(parts["vae"], torch.float32, side * side) for side in (256, 512))
    assert large == pytest.approx(4 * small, rel=0.1)


@EVERY
def test_without_weights_the_configs_tell_the_same(
    name: str, settings: ModelSettings, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(settings.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert parts(settings.model_copy(update={"model": str(bare)})) == parts(settings)


def test_half_the_precision_is_half_the_weights_but_for_a_vae_that_overflows(flux_folder: Path) -> None:
    settings = ModelSettings(model=str(zoo.locate("sdxl", flux_folder.parent)), endpoints=("any",))
    whole, half = parts(settings), parts(settings.model_copy(update={"dtype": "float16"}))
    assert half["model/unet"] == whole["model/unet"] // 2 if whole["model/unet"] else False
    assert half["model/vae"] == whole["model/vae"]


@EVERY
def test_the_bank_of_compiled_blocks_and_its_stage_are_there_from_the_start(
    name: str, settings: ModelSettings
) -> None:
    def stores(options: ModelSettings) -> int:
        return next(each.nbytes or 0 for each in placed(options, locate).stores if each.name == "LoRA bank")

    compiled = settings.model_copy(update={"speed": SpeedSettings(compile="regional")})
    told = parts(compiled)["LoRA bank and stage"] or 0
    assert "LoRA bank and stage" not in parts(settings)
    # what the denoiser's bank might come to take is not told twice
    assert stores(settings) - stores(compiled) == told // 2
    assert placed(compiled, locate).needed == placed(settings, locate).needed + told
    model = ENDPOINTS[FAMILIES[name]].pipeline().Pipeline.model_type.load(compiled, Path)
    bank = (model if hasattr(model, "_bank") else model.base)._bank
    buffers = [[layer.down, layer.up, layer.staged_down, layer.staged_up] for layer in bank._layers.values()]
    assert told == sum(each.nbytes for four in buffers for each in four)


def test_what_rows_remember_of_steps_is_told_where_steps_are_reused(flux_folder: Path) -> None:
    settings = ModelSettings(model=str(flux_folder), endpoints=("any",), batch_tokens=4096)
    fast = settings.model_copy(update={"speed": SpeedSettings(acceleration="regular")})
    config = next(each for each in components(flux_folder) if each.name == "transformer").config()
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = max(4096, settings.limits.max_pixels // 16**2)
    assert parts(fast)["peak of remembered steps"] == 2 * tokens * width * 4
    assert "peak of remembered steps" not in parts(settings)


def test_a_model_that_is_not_here_is_unknown_and_it_is_said_how_to_fetch_it() -> None:
    found = placed(ModelSettings(model="someone/model", endpoints=("any",)), locate)
    [weights] = found.weights
    assert weights.nbytes is None
    assert "hf download someone/model" in weights.note


def placement(share: float = 0.5, card: int | None = 40 * GIB, stores: int = 2 * GIB) -> Placement:
    weights, peaks = (Part("model", 14 * GIB),), (Part("forward", 2 * GIB), Part("decode", None))
    return Placement("m", weights, peaks, (Part("adapters", stores),), share, card)


def test_what_fits_its_share_may_start() -> None:
    placement().check()
    assert placement().verdict == "fits 20.00 GiB, which is 0.5 of the GPU"


def test_what_cannot_fit_refuses_and_says_by_how_many_bytes_and_what_to_change() -> None:
    with pytest.raises(
        NoRoom, match=rf"does not fit: {6 * GIB} bytes .* Raise num_gpus, or lower batch_tokens"
    ):
        placement(share=0.25).check()


def test_stores_that_would_not_fit_when_full_are_said_and_do_not_stop_it() -> None:
    tight = placement(stores=5 * GIB)
    tight.check()
    assert "lower adapter_bytes, lora_rank or the caches by 1.00 GiB" in tight.verdict


def test_without_a_card_or_on_the_cpu_nothing_is_refused() -> None:
    for each in (placement(card=None), placement(share=0)):
        each.check()
    assert placement(share=0).verdict == "on the CPU"
