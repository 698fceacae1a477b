"""IC-Light's offsets make a new UNet out of a base, which stays as it was; what does not fit is refused."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from pipelines.sd import ic_light
from pipelines.sd.ic_light import read
from pipelines.sd.loading import CONFIGS
from schemas.errors import AssetError
from tests.support import sd_controlnets

Tensors = dict[str, Tensor]

KINDS = pytest.mark.parametrize("channels", [8, 12])


def base(**changes: Any) -> Any:
    return sd_controlnets.base("sd1", **changes)


def offsets(unet: Any, channels: int, size: float = 0.01) -> Tensors:
    """Of each tensor, random."""
    generator = torch.Generator("cpu").manual_seed(7)
    shapes = {name: list(tensor.shape) for name, tensor in unet.state_dict().items()}
    shapes["conv_in.weight"][1] = channels
    return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def written(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a"  # as the cache of fetched files names them: without a suffix


@torch.inference_mode()
def answer(unet: Any, extra: int = 0) -> Tensor:
    """The UNet's prediction; `extra` channels of noise follow the latents."""
    inputs = sd_controlnets.inputs("sd1", rows=2)
    sample = inputs.pop("sample")
    generator = torch.Generator("cpu").manual_seed(9)
    noise = torch.randn(2, extra, *sample.shape[2:], generator=generator)
    inputs["sample"] = torch.cat([sample, noise], 1).to(unet.dtype)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].to(unet.dtype)
    prediction: Tensor = unet(**inputs, return_dict=False)[0]
    return prediction


@KINDS
def test_zero_offsets_change_nothing_whatever_the_condition(channels: int, path: Path) -> None:
    unet = base()
    zeros = offsets(unet, channels, size=0)
    lit = read(written(path, zeros), unet).apply(unet)
    torch.testing.assert_close(answer(lit, channels - 4), answer(unet), rtol=0, atol=1e-6)


@KINDS
def test_the_new_unet_is_the_base_plus_the_offsets(channels: int, path: Path) -> None:
    unet = base()
    given = offsets(unet, channels)

    light = read(written(path, given), unet)
    lit = light.apply(unet)

    assert (light.channels, light.reads_background) == (channels, channels == 12)
    assert lit.config.in_channels == channels
    merged = lit.state_dict()
    assert merged.keys() == given.keys()
    for name, weight in unet.state_dict().items():
        expected = given[name].clone()
        if name == "conv_in.weight":
            expected[:, :4] += weight
        else:
            expected += weight
        assert torch.equal(merged[name], expected)
    assert light.nbytes == sum(each.nbytes for each in merged.values())


def test_the_new_unet_answers_as_the_original_code_merges(path: Path) -> None:
    """A wider convolution in the base itself, then sums of state dicts (IC-Light's gradio_demo.py)."""
    unet, reference = base(), base()
    given = offsets(unet, 8, size=0.1)
    wider = torch.nn.Conv2d(8, reference.conv_in.out_channels, 3, 1, 1).requires_grad_(False)
    wider.weight.zero_()
    wider.weight[:, :4] = reference.conv_in.weight
    wider.bias = reference.conv_in.bias
    reference.conv_in = wider
    reference.load_state_dict({name: each + given[name] for name, each in reference.state_dict().items()})

    lit = read(written(path, given), unet).apply(unet)

    torch.testing.assert_close(answer(lit, 4), answer(reference, 4))
    assert not torch.allclose(answer(lit, 4)[:, :, :2], answer(unet)[:, :, :2], atol=1e-3)


def test_the_condition_is_read(path: Path) -> None:
    unet = base()
    lit = read(written(path, offsets(unet, 8, size=0.1)), unet).apply(unet)
    inputs = sd_controlnets.inputs("sd1", rows=1)
    sample = torch.cat([inputs.pop("sample"), torch.ones(1, 4, 6, 10)], 1)
    with torch.inference_mode():
        one, other = (lit(sample=each, **inputs).sample for each in (sample, sample * 2))
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_base_stays_as_it_was_and_shares_nothing(path: Path) -> None:
    unet = base()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    lit = read(written(path, offsets(unet, 8)), unet).apply(unet)
    with torch.no_grad():
        for parameter in lit.parameters():
            parameter.zero_()
    assert unet.config.in_channels == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_the_new_unet_is_ready_to_be_called(path: Path) -> None:
    unet = base()
    lit = read(written(path, offsets(unet, 8)), unet).apply(unet)
    assert not lit.training
    assert not any(parameter.requires_grad for parameter in lit.parameters())
    assert {parameter.device.type for parameter in lit.parameters()} == {"cpu"}


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_is_rounded_once(dtype: torch.dtype, stored: torch.dtype, path: Path) -> None:
    unet = base().to(dtype)
    given = {name: each.to(stored) for name, each in offsets(unet, 8).items()}

    light = read(written(path, given), unet)
    lit = light.apply(unet)

    assert {parameter.dtype for parameter in lit.parameters()} == {dtype}
    assert light.nbytes == sum(each.nbytes for each in lit.parameters())
    for name, weight in lit.state_dict().items():
        if name != "conv_in.weight":
            exact = unet.state_dict()[name].double() + given[name].double()
            assert torch.equal(weight, exact.float().to(dtype))
    assert answer(lit, 4).isfinite().all()


def test_neither_hooks_nor_attention_processors_come_along(path: Path) -> None:
    class Other:
        def __call__(self, *given: Any, **more: Any) -> Tensor:
            raise AssertionError("the base's own")

    plain, unet = base(), base()
    for module in unet.modules():
        module.register_forward_hook(lambda *given: given[-1])
    unet.set_attn_processor(Other())
    given = written(path, offsets(unet, 8))

    lit = read(given, unet).apply(unet)

    assert not any(module._forward_hooks for module in lit.modules())
    assert torch.equal(answer(lit, 4), answer(read(given, plain).apply(plain), 4))


def test_a_config_read_from_a_file_is_widened_as_well(path: Path) -> None:
    """Where a config says that a value is a default, diffusers would take the default again."""
    unet = base()
    config = dict(unet.config) | {"_use_default_values": ["in_channels"]}
    loaded = UNet2DConditionModel.from_config(config)
    loaded.load_state_dict(unet.state_dict())
    lit = read(written(path, offsets(unet, 12)), loaded).apply(loaded)
    assert lit.config.in_channels == 12
    assert lit.conv_in.in_channels == 12


@cache
def full_size() -> Any:
    """SD 1.5's UNet, without values, by the config that this server has for single files."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(str(CONFIGS["sd1"] / "unet"), local_files_only=True)
        )


@KINDS
def test_the_published_files_fit_the_full_size_unet(channels: int) -> None:
    """iclight_sd15_fc.safetensors and iclight_sd15_fbc.safetensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in full_size().state_dict().items()}
    assert len(shapes) == 686
    shapes["conv_in.weight"] = (320, channels, 3, 3)
    assert ic_light.check(shapes, full_size()) == channels
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert parameters == 859_520_964 + (channels - 4) * 320 * 9


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def with_shape(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def with_only(name: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors.clear()
        tensors[name] = torch.zeros(1)

    return change


KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
MISFITS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a tensor is missing": (
        without("conv_out.bias"),
        "IC-Light's file is not complete. It lacks conv_out.bias.",
    ),
    "a tensor too many": (
        with_shape("conv_in.scale", 8),
        "The file is not one of IC-Light: this model has no conv_in.scale.",
    ),
    "another width of text": (
        with_shape(KEY, 8, 32),
        f"IC-Light's file was made for another model: {KEY} has the shape [8, 32] where [8, 24] is expected.",
    ),
    "another kernel": (
        with_shape("conv_in.weight", 8, 8, 1, 1),
        "IC-Light's file was made for another model: conv_in.weight has the shape [8, 8, 1, 1] "
        "where [8, 8, 3, 3] is expected.",
    ),
    "no condition": (
        with_shape("conv_in.weight", 8, 4, 3, 3),
        "The file is not one of IC-Light: its conv_in.weight is for 4 channels, IC-Light's for 8 (with a "
        "foreground) or 12 (with a background as well).",
    ),
    "inpainting": (
        with_shape("conv_in.weight", 8, 9, 3, 3),
        "The file is not one of IC-Light: its conv_in.weight is for 9 channels, IC-Light's for 8 (with a "
        "foreground) or 12 (with a background as well).",
    ),
    "a flat convolution": (
        with_shape("conv_in.weight", 8, 8),
        "The file is not one of IC-Light: its conv_in.weight is for a tensor of shape [8, 8], IC-Light's for "
        "8 (with a foreground) or 12 (with a background as well).",
    ),
    "the original's names, as ComfyUI's files have": (
        with_only("diffusion_model.input_blocks.0.0.weight"),
        "The file is not one of IC-Light: its tensors have the names of the original Stable Diffusion, "
        "diffusers' are needed.",
    ),
    "a LoRA": (
        with_only("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
        "The file is not one of IC-Light: it is a LoRA.",
    ),
    "a ControlNet": (
        with_only("control_model.input_blocks.0.0.weight"),
        "The file is not one of IC-Light: it is a ControlNet.",
    ),
    "anything": (
        with_only("a"),
        "The file is not one of IC-Light: it has no conv_in.weight. What it has is a.",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_with_a_sentence(misfit: str, path: Path) -> None:
    unet = base()
    tensors = offsets(unet, 8)
    change, sentence = MISFITS[misfit]
    change(tensors)
    with pytest.raises(AssetError) as refusal:
        read(written(path, tensors), unet)
    assert (refusal.value.message, refusal.value.kind) == (sentence, "invalid_weights")


@pytest.mark.parametrize(("kind", "name"), [("sd2", "Stable Diffusion 2"), ("sdxl", "SDXL")])
def test_other_bases_are_refused(kind: str, name: str, path: Path) -> None:
    unet = sd_controlnets.base(kind)
    with pytest.raises(AssetError) as refusal:
        read(written(path, offsets(unet, 8)), unet)
    assert refusal.value.message == f"IC-Light is for Stable Diffusion 1.5, the model is {name}."


def test_a_base_that_was_lit_already_is_refused(path: Path) -> None:
    unet = base()
    lit = read(written(path, offsets(unet, 8)), unet).apply(unet)
    with pytest.raises(AssetError, match="only base models"):
        read(path, lit)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_sums_that_are_not_finite_in_the_bases_type_are_refused(value: float, path: Path) -> None:
    unet = base().half()
    tensors = offsets(unet, 8)
    tensors["conv_out.bias"][1] = value
    light = read(written(path, tensors), unet)
    with pytest.raises(AssetError, match="not finite numbers, in conv_out.bias") as refusal:
        light.apply(unet)
    assert refusal.value.kind == "invalid_weights"


def test_a_file_that_is_no_safetensors_file_is_refused(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(AssetError, match="only safetensors files are accepted"):
        read(path, base())
