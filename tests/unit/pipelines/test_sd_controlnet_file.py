"""SD's ControlNets come out of every layout of file as they went in; what does not fit is refused by name."""

import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.sd.controlnet_file import ControlNetConfig, architecture, load, read_config
from schemas.errors import AssetError
from tests.support import sd_controlnets
from tests.support.sd_controlnets import FULL_SIZE, KINDS, LAYOUTS, write

Tensors = dict[str, Tensor]

unet_of = cache(sd_controlnets.base)
full_size_unet_of = cache(sd_controlnets.full_size_base)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a"  # as the cache of fetched files names them: without a suffix


def config_of(net: Any) -> ControlNetConfig:
    return read_config(net.to_json_string().encode())


@torch.inference_mode()
def answer(net: Any, kind: str) -> list[Tensor]:
    inputs = sd_controlnets.inputs(KINDS[kind][0], rows=1)
    down, mid = net(**inputs, controlnet_cond=sd_controlnets.image()[None], return_dict=False)
    return [*down, mid]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_to_the_net_that_was_written(kind: str, layout: str, path: Path) -> None:
    net = sd_controlnets.build(kind)
    write(path, LAYOUTS[layout](net))

    loaded = load(path, unet_of(KINDS[kind][0]), config_of(net))

    assert config_of(loaded) == config_of(net)
    tensors = loaded.state_dict()
    assert tensors.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensors[name], tensor)
    for mine, other in zip(answer(loaded, kind), answer(net, kind), strict=True):
        assert torch.equal(mine, other)


ORDINARY = [kind for kind in KINDS if kind not in ("shuffle", "bgr")]


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_net_without_a_config_is_as_its_unet_is(kind: str, layout: str, path: Path) -> None:
    net = sd_controlnets.build(kind)
    write(path, LAYOUTS[layout](net))
    loaded = load(path, unet_of(KINDS[kind][0]))
    for mine, other in zip(answer(loaded, kind), answer(net, kind), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("layout", ["original", "original checkpoint"])
def test_the_original_names_are_those_that_diffusers_converts(kind: str, layout: str) -> None:
    net = sd_controlnets.build(kind)
    converted = convert_controlnet_checkpoint(LAYOUTS[layout](net), net.config)
    assert converted.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(converted[name], tensor)


# Some of control_v11p_sd15_canny.pth's, by hand.
ORIGINAL_NAMES = {
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "input_blocks.3.0.op.bias": (320,),
    "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "input_blocks.8.1.proj_in.weight": (1280, 1280, 1, 1),
    "input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
    "input_hint_block.14.weight": (320, 256, 3, 3),
    "middle_block.1.norm.weight": (1280,),
    "middle_block.2.emb_layers.1.weight": (1280, 1280),
    "middle_block_out.0.weight": (1280, 1280, 1, 1),
    "time_embed.2.weight": (1280, 1280),
    "zero_convs.11.0.weight": (1280, 1280, 1, 1),
}


def test_the_original_of_sd15_has_340_tensors() -> None:
    tensors = sd_controlnets.in_original_names(sd_controlnets.full_size("SD 1.5"))
    assert len(tensors) == 340
    assert {name: tuple(tensors[name].shape) for name in ORIGINAL_NAMES} == ORIGINAL_NAMES


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_tell_the_full_size_architectures(name: str, layout: str) -> None:
    base, arguments = FULL_SIZE[name]
    net = sd_controlnets.full_size(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in LAYOUTS[layout](net).items()}

    found = architecture(shapes, full_size_unet_of(base))

    expected = ControlNetConfig(**arguments).model_dump()
    told = found.model_dump()
    layers = [told.pop("transformer_layers_per_block"), expected.pop("transformer_layers_per_block")]
    assert told == expected
    with torch.device("meta"):
        rebuilt = ControlNetModel(**found.model_dump()).state_dict()
    assert {key: each.shape for key, each in rebuilt.items()} == {
        key: each.shape for key, each in net.state_dict().items()
    }
    assert layers[0][-1] == (layers[1] if isinstance(layers[1], int) else layers[1][-1])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SD 1.5", 361_279_120),
        ("SDXL", 1_251_014_160),
        ("SDXL mid", 272_586_000),
        ("SDXL small", 160_111_120),
    ],
)
def test_the_full_size_nets_have_as_many_parameters_as_the_published(name: str, parameters: int) -> None:
    assert sum(each.numel() for each in sd_controlnets.full_size(name).parameters()) == parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64])
def test_a_net_is_kept_as_its_unet_is(dtype: torch.dtype, stored: torch.dtype, path: Path) -> None:
    net = sd_controlnets.build("sd1")
    write(path, {name: tensor.to(stored) for name, tensor in sd_controlnets.in_a_checkpoint(net).items()})

    loaded = load(path, sd_controlnets.base("sd1").to(dtype))

    assert isinstance(loaded, ControlNetModel)
    assert {(each.dtype, each.device.type, each.requires_grad) for each in loaded.parameters()} == {
        (dtype, "cpu", False)
    }
    assert not any(module.training for module in loaded.modules())
    tensors = loaded.state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensors[name], tensor.to(stored).to(dtype))


def test_the_file_may_go_away_once_loaded(path: Path) -> None:
    net = sd_controlnets.build("sd1")
    loaded = load(write(path, net.state_dict()), unet_of("sd1"))
    path.write_bytes(b"")
    assert torch.equal(loaded.conv_in.weight, net.conv_in.weight)


@pytest.mark.parametrize("channels", [8, 9, 12])
def test_a_unet_that_reads_more_than_latents_takes_the_same_nets(channels: int, path: Path) -> None:
    net = sd_controlnets.build("sd1")
    loaded = load(write(path, net.state_dict()), sd_controlnets.base("sd1", in_channels=channels))
    assert config_of(loaded).in_channels == 4


def good(kind: str = "sd1", **changes: Any) -> Tensors:
    return sd_controlnets.in_diffusers_names(sd_controlnets.build(kind, **changes))


def original(kind: str = "sd1", **changes: Any) -> Tensors:
    return sd_controlnets.in_a_checkpoint(sd_controlnets.build(kind, **changes))


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def filled(tensors: Tensors, name: str, value: float) -> Tensors:
    return tensors | {name: torch.full_like(tensors[name], value)}


def ones(*names: str) -> Tensors:
    return {name: torch.ones(8, 8) for name in names}


HINT = "controlnet_cond_embedding.conv_in.weight"
PROJ = "down_blocks.0.attentions.0.proj_in.weight"
LORA = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "made for another model"

REFUSED: dict[str, tuple[Callable[[], Tensors], str]] = {
    "a LoRA": (lambda: ones(f"{LORA}.lora_A.weight", f"{LORA}.lora_B.weight"), "is a LoRA, not a ControlNet"),
    "a LoRA of kohya's": (
        lambda: ones("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"),
        "is a LoRA",
    ),
    "a LoRA inside": (lambda: good() | ones(f"{LORA}.lora_A.weight"), "is a LoRA"),
    "a union": (
        lambda: good("sdxl") | ones("task_embedding", "transformer_layes.0.ln_1.weight"),
        "is a ControlNet-Union; only nets for one kind of control image",
    ),
    "an original union": (lambda: ones("control_model.control_add_embedding.linear_1.weight"), "-Union"),
    "a difference": (
        lambda: original() | {"difference": torch.tensor(1.0)},
        "is the difference between a ControlNet and its base; only whole nets",
    ),
    "a T2I-Adapter": (lambda: ones("body.0.block1.weight", "conv_in.weight"), "is a T2I-Adapter"),
    "diffusers' T2I-Adapter": (lambda: ones("adapter.body.0.resnets.0.block1.weight"), "is a T2I-Adapter"),
    "a Control-LoRA": (lambda: ones("lora_controlnet", "input_blocks.1.0.emb_layers.1.up"), "a Control-LoRA"),
    "an LLLite": (
        lambda: ones("lllite_unet_input_blocks_4_1_proj_in.down.0.weight"),
        "is a ControlNet-LLLite",
    ),
    "FLUX's": (
        lambda: ones("controlnet_x_embedder.weight", "transformer_blocks.0.norm1.linear.weight"),
        "for a transformer, such as FLUX, not for Stable Diffusion",
    ),
    "SD3's": (lambda: ones("pos_embed_input.proj.weight"), "for a transformer"),
    "a whole UNet": (lambda: dict(unet_of("sd1").state_dict()), "holds a whole UNet"),
    "a whole original": (lambda: ones("model.diffusion_model.output_blocks.0.0.weight"), "a whole UNet"),
    "anything else": (
        lambda: ones("encoder.weight", "decoder.weight"),
        rf"not a ControlNet for Stable Diffusion: it has no {HINT}. What it has is .*encoder.weight",
    ),
    "SDXL's on SD": (lambda: good("sdxl"), f"{OTHER}: it reads text 40 wide where 24 is expected"),
    "SDXL's original on SD": (lambda: original("sdxl"), f"{OTHER}: it reads text 40 wide where 24"),
    "SDXL's small on SD": (lambda: good("sdxl small"), "was made for SDXL: it reads pooled text"),
    "SD2's on SD1": (lambda: good("sd2"), f"{OTHER}: it reads text 32 wide where 24 is expected"),
    "wider": (
        lambda: good(block_out_channels=(16, 32)),
        rf"{OTHER}: \S+ has the shape \[16.*\] where \[8.*\] is expected",
    ),
    "a narrower original": (
        lambda: original() | {"control_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)},
        rf"{OTHER}: control_model.input_blocks.0.0.weight has the shape \[4, 4, 3, 3\]",
    ),
    "nine channels in": (lambda: good(in_channels=9), rf"{OTHER}: conv_in.weight has .*\[8, 9, 3, 3\]"),
    "six channels of image": (
        lambda: good(conditioning_channels=6),
        rf"does not read pictures of 3 channels: {HINT} has the shape \[4, 6, 3, 3\]",
    ),
    "a hint of one axis": (lambda: good() | {HINT: torch.ones(4)}, rf"{HINT} has the shape \[4\]"),
    "a number for a hint": (lambda: good() | {HINT: torch.tensor(1.0)}, rf"{HINT} has the shape \[\]"),
    "a hint that shrinks less": (
        lambda: good(conditioning_embedding_out_channels=(4, 6, 10)),
        "lacks controlnet_cond_embedding.blocks.4.weight",
    ),
    "a hint that shrinks more": (
        lambda: good(conditioning_embedding_out_channels=(4, 6, 8, 10, 12)),
        "no place for controlnet_cond_embedding.blocks.6.bias",
    ),
    "another block": (
        lambda: good(block_out_channels=(8, 16, 16), down_block_types=("CrossAttnDownBlock2D",) * 3),
        "no place for controlnet_down_blocks.6.bias",
    ),
    "a layer more": (lambda: good(layers_per_block=3), r"no place for .*down_blocks.0.attentions.2\."),
    "a layer less": (lambda: original(layers_per_block=1), r"lacks down_blocks.0.attentions.1\."),
    "a proj of one kind each": (
        lambda: good() | {PROJ: torch.ones(8, 8)},
        rf"{OTHER}: down_blocks.0.attentions.\d.proj_\w+.weight has the shape \[8, 8, 1, 1\]",
    ),
    "a missing attention": (
        lambda: without(original(), "input_blocks.2.1."),
        r"lacks down_blocks.0.attentions.1.norm.weight",
    ),
    "a missing layer": (
        lambda: without(good(), "controlnet_down_blocks.1.bias"),
        "lacks controlnet_down_blocks.1.bias",
    ),
    "a missing original layer": (
        lambda: without(original(), "zero_convs.2.0.weight"),
        "lacks controlnet_down_blocks.2.weight",
    ),
    "a missing hint layer": (
        lambda: without(original(), "hint_block.8."),
        "lacks controlnet_cond_embedding.blocks.3.weight",
    ),
    "a missing downsampler": (
        lambda: without(original(), "0.op."),
        "no place for control_model.input_blocks.4",
    ),
    "an extra key": (lambda: good() | ones("conv_norm_out.weight"), "no place for conv_norm_out.weight"),
    "an extra original key": (
        lambda: original() | ones("control_model.input_blocks.1.0.h_upd.weight"),
        "no place for control_model.input_blocks.1.0.h_upd.weight",
    ),
    "input block zero": (
        lambda: original() | ones("control_model.input_blocks.0.1.norm.weight"),
        "no place for control_model.input_blocks.0.1.norm.weight",
    ),
    "both names": (
        lambda: good() | {"time_embed.0.bias": torch.ones(32)},
        "two names: time_embedding.linear_1.bias",
    ),
    "both prefixes": (
        lambda: original() | {"time_embed.0.bias": torch.ones(32)},
        "two names: time_embedding.linear_1.bias",
    ),
    "17 layers": (
        lambda: good() | ones("mid_block.attentions.0.transformer_blocks.16.norm1.weight"),
        "a transformer of 17 layers; at most 16",
    ),
    "a layer of 200 digits": (
        lambda: good() | ones(f"mid_block.attentions.0.transformer_blocks.{'9' * 200}.norm1.weight"),
        "no place for mid_block.attentions.0.transformer_blocks.999",
    ),
    "NaN": (lambda: filled(good(), "conv_in.weight", torch.nan), "not finite numbers, in conv_in.weight"),
    "infinity": (
        lambda: filled(original(), "control_model.time_embed.0.bias", torch.inf),
        "not finite numbers, in control_model.time_embed.0.bias",
    ),
    "past 32 bits": (
        lambda: good() | {"conv_in.bias": torch.full((8,), 1e300, dtype=torch.float64)},
        "not finite numbers, in conv_in.bias",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_name(kind: str, path: Path) -> None:
    make, sentence = REFUSED[kind]
    write(path, make())
    unet = unet_of("sd1")

    start = time.process_time()
    with pytest.raises(AssetError, match=sentence) as refusal:
        load(path, unet)
    assert time.process_time() - start < 10
    assert refusal.value.kind == "invalid_weights"
    assert refusal.value.message[-1] == "."


@pytest.mark.parametrize(
    ("made_for", "used_with", "sentence"),
    [
        ("SDXL", "SD 1.5", "made for SDXL: it reads text 2048 wide where 768 is expected"),
        ("SDXL mid", "SD 2.1", "made for SDXL: it reads text 2048 wide where 1024"),
        ("SDXL small", "SD 1.5", "made for SDXL: it reads pooled text, which this model has not"),
        ("SD 1.5", "SD 2.1", "made for SD 1.x: it reads text 768 wide where 1024"),
        ("SD 2.1", "SDXL", "made for SD 2.x: it reads text 1024 wide where 2048"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_net_for_another_base_is_told_by_its_text(
    made_for: str, used_with: str, sentence: str, layout: str
) -> None:
    net = sd_controlnets.full_size(made_for)
    shapes = {key: tuple(tensor.shape) for key, tensor in LAYOUTS[layout](net).items()}
    with pytest.raises(AssetError, match=sentence):
        architecture(shapes, full_size_unet_of(used_with))


def test_sdxls_net_reads_pooled_text(path: Path) -> None:
    write(path, without(good("sdxl"), "add_embedding"))
    with pytest.raises(AssetError, match="not made for SDXL: it has no add_embedding.linear_1.weight"):
        load(path, unet_of("sdxl"))


def test_a_web_page_is_refused(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><html><body>Not found</body></html>")
    with pytest.raises(AssetError, match="a web page") as refusal:
        load(path, unet_of("sd1"))
    assert refusal.value.kind == "invalid_weights"


@cache
def small(layout: str) -> Tensors:
    return LAYOUTS[layout](sd_controlnets.build("sd1"))


@settings(max_examples=60)
@given(
    layout=st.sampled_from(list(LAYOUTS)),
    data=st.data(),
    shape=st.none() | st.lists(st.integers(1, 3), max_size=4),
)
def test_any_tensor_that_is_missing_or_of_another_shape_is_refused(
    layout: str, data: st.DataObject, shape: list[int] | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = small(layout)
    key = data.draw(st.sampled_from(sorted(tensors)))
    changed = {name: tensor for name, tensor in tensors.items() if name != key}
    if shape is not None:
        changed[key] = torch.ones(shape)
    path = tmp_path_factory.getbasetemp() / "changed"
    write(path, changed)
    with pytest.raises(AssetError) as refusal:
        load(path, unet_of("sd1"))
    assert refusal.value.kind == "invalid_weights"


SDXL_CONFIG: Mapping[str, Any] = {
    "_class_name": "ControlNetModel",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "global_pool_conditions": False,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_time_scale_shift": "default",
    "transformer_layers_per_block": [1, 2, 10],
    "upcast_attention": None,
    "use_linear_projection": True,
}
SD_CONFIG: Mapping[str, Any] = {
    "_class_name": "ControlNetModel",
    "_diffusers_version": "0.16.0.dev0",
    "_name_or_path": "/home/someone/control_v11p_sd15",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "class_embed_type": None,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}
OF_OLD = {
    "center_input_sample": False,
    "controlnet_conditioning_channels": 3,
    "conv_in_kernel": 3,
    "sample_size": 64,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# As published.
CONFIGS: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {
    "diffusers/controlnet-canny-sdxl-1.0": (
        SDXL_CONFIG,
        FULL_SIZE["SDXL"][1] | {"upcast_attention": None},
    ),
    "lllyasviel/control_v11p_sd15_canny": (SD_CONFIG, FULL_SIZE["SD 1.5"][1]),
    "lllyasviel/control_v11e_sd15_shuffle": (
        {**SD_CONFIG, "global_pool_conditions": True},
        FULL_SIZE["SD 1.5"][1] | {"global_pool_conditions": True},
    ),
    "with a UNet's keys of old": ({**SD_CONFIG, **OF_OLD}, FULL_SIZE["SD 1.5"][1]),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_is_read_as_diffusers_writes_it(kind: str) -> None:
    written, expected = CONFIGS[kind]
    assert read_config(json.dumps(written).encode()) == ControlNetConfig(**expected)


def test_a_config_has_diffusers_own_arguments_and_defaults() -> None:
    with torch.device("meta"):
        net = ControlNetModel()
    own = {key: value for key, value in net.config.items() if not key.startswith("_")}
    assert json.loads(json.dumps(ControlNetConfig().model_dump())) == json.loads(json.dumps(own))


def field(name: str, value: Any) -> bytes:
    return json.dumps({name: value}).encode()


BAD_CONFIGS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "JSON"),
    "a web page": (b"<html>", "JSON"),
    "half": (b'{"in_channels": 4', "JSON"),
    "nested without end": (b"[" * 60_000, "JSON"),
    "bytes": (b'{"in_channels": "\xff"}', "JSON"),
    "a list": (b"[]", "object"),
    "a thousand digits": (b'{"in_channels": 1' + b"0" * 1000 + b"}", "in_channels: .*less than"),
    "a string": (field("layers_per_block", "2"), "layers_per_block: .*integer"),
    "a fraction": (field("layers_per_block", 2.5), "layers_per_block: .*integer"),
    "NaN": (b'{"norm_eps": NaN}', "norm_eps"),
    "infinity": (b'{"mid_block_scale_factor": Infinity}', "mid_block_scale_factor"),
    "below zero": (field("norm_eps", -1e-5), "norm_eps: .*greater than 0"),
    "a truth for a number": (field("freq_shift", True), "freq_shift"),
    "a number for a truth": (field("flip_sin_to_cos", 1), "flip_sin_to_cos: .*boolean"),
    "null": (field("in_channels", None), "in_channels"),
    "no layers": (field("layers_per_block", 0), "layers_per_block"),
    "17 transformer layers": (field("transformer_layers_per_block", 17), "transformer_layers_per_block"),
    "nested transformer layers": (field("transformer_layers_per_block", [[1], [2]]), "transformer_layers"),
    "no blocks": (field("block_out_channels", []), "block_out_channels"),
    "nine blocks": (field("block_out_channels", [32] * 9), "block_out_channels: .*8"),
    "too few blocks": (
        field("block_out_channels", [32]),
        "down_block_types has 4 values for the 1 block_out_channels",
    ),
    "too few heads": (field("attention_head_dim", [5, 10]), "attention_head_dim has 2 values for the 4"),
    "too many layers": (
        field("transformer_layers_per_block", [1] * 5),
        "transformer_layers_per_block has 5 values for the 4",
    ),
    "too few other heads": (field("num_attention_heads", [8]), "num_attention_heads has 1 values"),
    "heads that do not divide": (field("attention_head_dim", 7), "320 .* into 7 heads and 32 groups"),
    "other heads that do not divide": (field("num_attention_heads", 7), "320 .* into 7 heads"),
    "groups that do not divide": (field("norm_num_groups", 7), "320 .* into 8 heads and 7 groups"),
    "a motion block": (field("down_block_types", ["DownBlockMotion"] * 4), "down_block_types: .*DownBlock2D"),
    "a mid block of another kind": (field("mid_block_type", None), "mid_block_type"),
    "another padding": (field("downsample_padding", 0), "downsample_padding"),
    "another activation": (field("act_fn", "os.system"), "act_fn: .*silu"),
    "other embeddings": (field("addition_embed_type", "text_image"), "addition_embed_type: .*text_time"),
    "classes": (field("class_embed_type", "projection"), "class_embed_type"),
    "an order of no kind": (
        field("controlnet_conditioning_channel_order", "rbg"),
        "controlnet_conditioning_channel_order: .*'rgb' or 'bgr'",
    ),
    "an unknown key": (field("num_control_type", 6), "num_control_type: "),
    "a long unknown key": (field("k" * 60_000, 1), r"k{100}: "),
    "a union's": (field("_class_name", "ControlNetUnionModel"), "_class_name is not ControlNetModel"),
    "a nameless class": (field("_class_name", ["ControlNetModel"]), "_class_name"),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_config_that_makes_no_sense_is_refused_by_field(kind: str) -> None:
    data, sentence = BAD_CONFIGS[kind]
    with pytest.raises(AssetError, match=sentence) as refusal:
        read_config(data)
    assert refusal.value.kind == "invalid_config"
    assert len(refusal.value.message) < 300
    assert refusal.value.message[-1] == "."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_channels", 8),
        ("conditioning_channels", 6),
        ("down_block_types", ("DownBlock2D",) * 3),
        ("mid_block_type", "UNetMidBlock2D"),
        ("block_out_channels", (320, 640, 1280)),
        ("layers_per_block", 1),
        ("cross_attention_dim", 2048),
        ("transformer_layers_per_block", (1, 2, 10)),
        ("transformer_layers_per_block", 1),
        ("use_linear_projection", False),
        ("addition_embed_type", None),
        ("addition_time_embed_dim", 256),
        ("projection_class_embeddings_input_dim", 2816),
        ("conditioning_embedding_out_channels", (16, 32, 96, 256)),
    ],
)
def test_a_config_that_contradicts_the_file_is_refused(name: str, value: Any, path: Path) -> None:
    net = sd_controlnets.build("sdxl")
    write(path, net.state_dict())
    config = config_of(net).model_copy(update={name: value})

    with pytest.raises(AssetError, match=f"says that {name} is .*, its tensors and the model say") as refusal:
        load(path, unet_of("sdxl"), config)
    assert refusal.value.kind == "invalid_config"


def test_the_middle_has_as_many_layers_as_the_last_block_would(path: Path) -> None:
    net = sd_controlnets.build("sd1")
    write(path, net.state_dict())
    config = config_of(net).model_copy(update={"transformer_layers_per_block": (1, 2)})
    with pytest.raises(AssetError, match="transformer_layers_per_block is .1, 2., .* say .1, 1"):
        load(path, unet_of("sd1"), config)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # what blocks without attention would have
        ("sdxl mid", {"transformer_layers_per_block": (0, 0, 1)}),
        ("sdxl small", {"transformer_layers_per_block": 0, "cross_attention_dim": 1280}),
        (
            "sdxl without attention",
            {"transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True},
        ),
        # what nets without pooled text would have
        ("sd1", {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}),
        ("sd1", {"transformer_layers_per_block": (1, 1)}),
    ],
)
def test_what_means_nothing_to_a_net_contradicts_nothing(
    kind: str, changes: dict[str, Any], path: Path
) -> None:
    net = sd_controlnets.build(kind)
    write(path, net.state_dict())
    loaded = load(path, unet_of(KINDS[kind][0]), config_of(net).model_copy(update=changes))
    for mine, other in zip(answer(loaded, kind), answer(net, kind), strict=True):
        assert torch.equal(mine, other)


# What tensors do not tell, and the UNet's own is another.
UNTOLD: dict[str, Any] = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 2.0,
    "act_fn": "gelu",
    "norm_num_groups": 2,
    "norm_eps": 0.1,
    "attention_head_dim": (4, 8),
    "num_attention_heads": 4,
    "controlnet_conditioning_channel_order": "bgr",
    "global_pool_conditions": True,
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_tensors_do_not_tell_comes_from_the_config(name: str, path: Path) -> None:
    net = sd_controlnets.build("sd1", **{name: UNTOLD[name]})
    write(path, net.state_dict())

    told, untold = load(path, unet_of("sd1"), config_of(net)), load(path, unet_of("sd1"))

    expected = answer(net, "sd1")
    for mine, other in zip(answer(told, "sd1"), expected, strict=True):
        assert torch.equal(mine, other)
    assert not all(map(torch.equal, answer(untold, "sd1"), expected))


NETS_ONLY = {"num_attention_heads", "controlnet_conditioning_channel_order", "global_pool_conditions"}
OF_THE_UNET = {name: value for name, value in UNTOLD.items() if name not in NETS_ONLY}


@pytest.mark.parametrize("name", [*OF_THE_UNET, "upcast_attention"])
def test_or_from_the_unet(name: str, path: Path) -> None:
    changes = {name: OF_THE_UNET.get(name, True)}
    net = sd_controlnets.build("sd1", **changes)
    loaded = load(write(path, net.state_dict()), sd_controlnets.base("sd1", **changes))
    assert getattr(config_of(loaded), name) == changes[name]
    for mine, other in zip(answer(loaded, "sd1"), answer(net, "sd1"), strict=True):
        assert torch.equal(mine, other)
