"""ControlNets come out of every layout of file as they went in; what does not fit is refused by name."""

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.flux.controlnet_file import ControlNetConfig, architecture, load, read_config
from schemas.errors import AssetError
from tests.support import controlnets
from tests.support.controlnets import KINDS, LAYOUTS, WIDTHS, write

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def base() -> Any:
    return controlnets.base()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a"  # as the cache of fetched files names them: without a suffix


def config_of(net: Any) -> ControlNetConfig:
    return read_config(net.to_json_string().encode())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_config", [False, True])
def test_every_layout_loads_to_the_net_that_was_written(
    kind: str, layout: str, with_config: bool, base: Any, path: Path
) -> None:
    net = controlnets.build(kind)
    write(path, LAYOUTS[layout](net))

    loaded = load(path, base, config_of(net) if with_config else None)

    assert config_of(loaded) == config_of(net)
    assert loaded.state_dict().keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    samples, expected = answer(loaded), answer(net)
    assert len(samples) == len(expected) > 0
    for mine, other in zip(samples, expected, strict=True):
        assert torch.equal(mine, other)


@torch.inference_mode()
def answer(net: Any) -> list[Tensor]:
    inputs = controlnets.inputs(rows=1)
    samples, single_samples = net(
        **(inputs if net.config.guidance_embeds else inputs | {"guidance": None}),
        controlnet_cond=controlnets.image(net)[None],
        controlnet_mode=torch.tensor([[3]]),
        return_dict=False,
    )
    return [*(samples or ()), *(single_samples or ())]


def test_the_layouts_differ_in_all_but_the_controls_own_names() -> None:
    net = controlnets.build("pixels and single blocks")
    shared = LAYOUTS["diffusers"](net).keys() & LAYOUTS["original"](net).keys()
    assert {name.split(".")[0] for name in shared} == {"controlnet_blocks", "controlnet_single_blocks"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64])
def test_a_net_is_kept_as_its_base_is(dtype: torch.dtype, stored: torch.dtype, path: Path) -> None:
    net = controlnets.build("XLabs")
    write(path, {name: tensor.to(stored) for name, tensor in controlnets.in_original_names(net).items()})

    loaded = load(path, controlnets.base().to(dtype))

    assert isinstance(loaded, FluxControlNetModel)
    assert {(each.dtype, each.device.type, each.requires_grad) for each in loaded.parameters()} == {
        (dtype, "cpu", False)
    }
    assert not any(module.training for module in loaded.modules())
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(stored).to(dtype))


def test_the_file_may_go_away_once_loaded(base: Any, path: Path) -> None:
    net = controlnets.build("InstantX")
    loaded = load(write(path, net.state_dict()), base)
    path.write_bytes(b"")
    assert torch.equal(loaded.x_embedder.weight, net.x_embedder.weight)


# Published nets, by the arguments in their config.json.
FULL_SIZE: dict[str, dict[str, Any]] = {
    "InstantX/FLUX.1-dev-Controlnet-Canny": {"num_layers": 5, "num_single_layers": 0},
    "InstantX/FLUX.1-dev-Controlnet-Union": {"num_layers": 5, "num_single_layers": 10, "num_mode": 10},
    "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0": {"num_layers": 6, "num_single_layers": 0},
    "XLabs-AI/flux-controlnet-canny-diffusers": {
        "num_layers": 2,
        "num_single_layers": 0,
        **controlnets.PIXELS,
    },
}


@pytest.fixture(scope="module")
def flux_dev() -> Any:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_tell_the_full_size_architectures(name: str, layout: str, flux_dev: Any) -> None:
    arguments = {"guidance_embeds": True, **FULL_SIZE[name]}
    with torch.device("meta"):
        net = controlnets.empty(**arguments)
        shapes = {key: tuple(tensor.shape) for key, tensor in LAYOUTS[layout](net).items()}

    assert architecture(shapes, flux_dev) == ControlNetConfig(**arguments)


def test_union_pro_has_3_30_billion_parameters() -> None:
    with torch.device("meta"):
        net = controlnets.empty(num_layers=5, num_single_layers=10, num_mode=10, guidance_embeds=True)
    assert sum(each.numel() for each in net.parameters()) == 3_301_956_608


def good(kind: str = "InstantX", **changes: Any) -> Tensors:
    return controlnets.in_diffusers_names(controlnets.build(kind, **changes))


def original(kind: str = "XLabs") -> Tensors:
    return controlnets.in_original_names(controlnets.build(kind))


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def filled(tensors: Tensors, name: str, value: float) -> Tensors:
    return tensors | {name: torch.full_like(tensors[name], value)}


def lora() -> Tensors:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    return {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}


SDXL = {
    "controlnet_cond_embedding.conv_in.weight": torch.ones(16, 3, 3, 3),
    "controlnet_down_blocks.0.weight": torch.ones(320, 320, 1, 1),
    "down_blocks.0.resnets.0.conv1.weight": torch.ones(320, 320, 3, 3),
}
SD3 = {
    "controlnet_blocks.0.weight": torch.ones(32, 32),
    "pos_embed_input.proj.weight": torch.ones(32, 16, 2, 2),
    "transformer_blocks.0.attn.to_q.weight": torch.ones(32, 32),
}
X = "controlnet_x_embedder.weight"
HINT_OUT = "input_hint_block.conv_out.weight"
OTHER = "made for another model"

REFUSED: dict[str, tuple[Callable[[], Tensors], str]] = {
    "a LoRA": (lora, f"not a ControlNet for FLUX: .*{X}.*to_q.lora_A.weight, .*lora_B"),
    "SDXL's": (lambda: SDXL, "not a ControlNet for FLUX: .*controlnet_cond_embedding.conv_in.weight"),
    "SD3's": (lambda: SD3, "not a ControlNet for FLUX: .*pos_embed_input.proj.weight"),
    "a whole FLUX": (lambda: dict(controlnets.base().state_dict()), "not a ControlNet for FLUX"),
    "no blocks": (lambda: without(good(), "blocks."), "has no blocks"),
    "a wider base": (lambda: good(num_attention_heads=3), rf"{OTHER}: \S+ has .*48.* where .*32.* expected"),
    "a narrower original": (lambda: original() | {"img_in.weight": torch.ones(16, 64)}, rf"{OTHER}: img_in"),
    "other heads": (
        lambda: good(num_attention_heads=1, attention_head_dim=32, axes_dims_rope=(8, 12, 12)),
        rf"{OTHER}: .*norm_\w+.weight has the shape \[32\] where \[16\]",
    ),
    "other text": (lambda: good(joint_attention_dim=40), rf"{OTHER}: context_embedder.weight .*\[32, 40\]"),
    "other pooled text": (lambda: good(pooled_projection_dim=40), rf"{OTHER}: .*text_embedder.*\[32, 40\]"),
    "more channels in": (lambda: good(in_channels=128), rf"{OTHER}: .*x_embedder.weight .*128.*64"),
    "an inpainting net": (lambda: good() | {X: torch.ones(32, 320)}, rf"{OTHER}: {X} .*\[32, 320\]"),
    "other hint channels": (
        lambda: good("XLabs", conditioning_embedding_channels=8),
        rf"{OTHER}: input_hint_block.conv_out.\w+ has .*\[8.* where \[16",
    ),
    "a hint of one axis": (lambda: good("XLabs") | {HINT_OUT: torch.ones(16)}, rf"{OTHER}: {HINT_OUT}"),
    "a fused layer without v": (
        lambda: original() | {"double_blocks.0.img_attn.qkv.weight": torch.ones(64, 32)},
        rf"{OTHER}: double_blocks.0.img_attn.qkv.weight has the shape \[64, 32\] where \[96, 32\]",
    ),
    "modes without width": (
        lambda: good() | {"controlnet_mode_embedder.weight": torch.ones(10)},
        rf"{OTHER}: controlnet_mode_embedder.weight has the shape \[10\] where \[10, 32\]",
    ),
    "a number for modes": (
        lambda: good() | {"controlnet_mode_embedder.weight": torch.tensor(1.0)},
        "A ControlNet for FLUX has no place for controlnet_mode_embedder.weight",
    ),
    "a missing block": (lambda: without(good("union 2.0"), "blocks.1."), r"lacks .*transformer_blocks.1\."),
    "a missing last block": (
        lambda: without(good("union 2.0"), "transformer_blocks.2."),
        "no place for controlnet_blocks.2",
    ),
    "a missing layer": (
        lambda: without(good(), "controlnet_blocks.1.bias"),
        "lacks controlnet_blocks.1.bias",
    ),
    "a missing original layer": (
        lambda: without(original(), "0.txt_attn.qkv.bias"),
        "lacks .*add_q_proj.bias, .*add_k_proj.bias, .*add_v_proj.bias",
    ),
    "a missing hint": (
        lambda: without(original(), "hint_block.8."),
        "lacks input_hint_block.blocks.3.weight",
    ),
    "an extra key": (lambda: good() | {"norm_out.weight": torch.ones(1)}, "place for norm_out.weight"),
    "a LoRA inside": (lambda: good() | lora(), "place for .*lora_A.weight, .*lora_B.weight"),
    "an original norm with a bias": (
        lambda: original() | {"double_blocks.0.img_attn.norm.key_norm.bias": torch.ones(16)},
        "place for .*key_norm.bias",
    ),
    "both names": (lambda: good() | {"img_in.bias": torch.ones(32)}, "two names: x_embedder.bias"),
    "65 blocks": (
        lambda: good() | {"transformer_blocks.64.attn.to_q.weight": torch.ones(32, 32)},
        "has 65 double blocks; at most 64",
    ),
    "999,999 blocks": (
        lambda: original() | {"single_blocks.999998.linear1.weight": torch.ones(32, 32)},
        "has 999999 single blocks; at most 64",
    ),
    "a block of 300 digits": (
        lambda: good() | {f"transformer_blocks.{'9' * 250}.attn.to_q.weight": torch.ones(32, 32)},
        "place for transformer_blocks.999",
    ),
    "NaN": (lambda: filled(good(), X, torch.nan), f"not finite numbers, in {X}"),
    "infinity": (lambda: filled(original(), "img_in.bias", torch.inf), "not finite numbers, in img_in.bias"),
    "past 32 bits": (
        lambda: good() | {X: torch.full((32, 64), 1e300, dtype=torch.float64)},
        f"not finite numbers, in {X}",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_name(kind: str, base: Any, path: Path) -> None:
    make, sentence = REFUSED[kind]
    write(path, make())

    start = time.thread_time()
    with pytest.raises(AssetError, match=sentence) as refusal:
        load(path, base)
    assert time.thread_time() - start < 20
    assert refusal.value.kind == "invalid_weights"
    assert refusal.value.message[-1] == "."


def test_a_web_page_is_refused(base: Any, path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><html><body>Not found</body></html>")
    with pytest.raises(AssetError, match="a web page") as refusal:
        load(path, base)
    assert refusal.value.kind == "invalid_weights"


small = cache(lambda: good(num_layers=1))


@settings(max_examples=30)
@given(
    key=st.deferred(lambda: st.sampled_from(sorted(small()))),
    shape=st.none() | st.lists(st.integers(1, 5), max_size=4),
)
def test_any_tensor_that_is_missing_or_of_another_shape_is_refused(
    key: str, shape: list[int] | None, base: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    changed = without(small(), key) if shape is None else small() | {key: torch.ones(shape)}
    path = tmp_path_factory.getbasetemp() / "changed"
    write(path, changed)
    with pytest.raises(AssetError) as refusal:
        load(path, base)
    assert refusal.value.kind == "invalid_weights"


# As published, or as diffusers' training script saves them.
CONFIGS: dict[str, tuple[dict[str, Any], ControlNetConfig]] = {
    "InstantX/FLUX.1-dev-Controlnet-Union": (
        {
            "_class_name": "FluxControlNetModel",
            "_diffusers_version": "0.30.0.dev0",
            "_name_or_path": "/somewhere/",
            "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56],
            "guidance_embeds": True,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 5,
            "num_mode": 10,
            "num_single_layers": 10,
            "patch_size": 1,
            "pooled_projection_dim": 768,
        },
        ControlNetConfig(num_layers=5, num_single_layers=10, num_mode=10, guidance_embeds=True),
    ),
    "with a copied out_channels": (
        {"num_layers": 4, "out_channels": None, "num_mode": None},
        ControlNetConfig(num_layers=4),
    ),
    "nothing": ({}, ControlNetConfig()),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_is_read_as_diffusers_writes_it(kind: str) -> None:
    written, expected = CONFIGS[kind]
    assert read_config(json.dumps(written).encode()) == expected


def test_a_config_has_diffusers_own_arguments_and_defaults() -> None:
    with torch.device("meta"):
        net = controlnets.empty()
    own = {key: value for key, value in net.config.items() if not key.startswith("_")}
    ours = ControlNetConfig().model_dump()
    assert own == ours | {"axes_dims_rope": list(ours["axes_dims_rope"])}


BAD_CONFIGS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "JSON"),
    "a web page": (b"<html>", "JSON"),
    "half": (b'{"num_layers": 5', "JSON"),
    "nested without end": (b"[" * 60_000, "JSON"),
    "bytes": (b'{"num_layers": "\xff"}', "JSON"),
    "a list": (b"[]", "object"),
    "a number of a thousand digits": (b'{"num_layers": 1' + b"0" * 1000 + b"}", "num_layers: .*less than"),
    "a string": (b'{"num_layers": "5"}', "num_layers: .*integer"),
    "a fraction": (b'{"num_layers": 5.5}', "num_layers: .*integer"),
    "NaN": (b'{"num_layers": NaN}', "num_layers"),
    "a truth for a number": (b'{"num_layers": true}', "num_layers: .*integer"),
    "a number for a truth": (b'{"guidance_embeds": 1}', "guidance_embeds: .*boolean"),
    "null": (b'{"in_channels": null}', "in_channels"),
    "65 blocks": (b'{"num_single_layers": 65}', "num_single_layers: .*64"),
    "fewer than none": (b'{"num_layers": -1}', "num_layers"),
    "no modes": (b'{"num_mode": 0}', "num_mode"),
    "two axes": (b'{"axes_dims_rope": [64, 64]}', "axes_dims_rope"),
    "an odd axis": (b'{"axes_dims_rope": [16, 55, 57]}', r"axes_dims_rope.1: .*multiple of 2"),
    "axes that fill no head": (b'{"axes_dims_rope": [16, 56, 58]}', r"axes_dims_rope \[16, 56, 58\] .* 128"),
    "an unknown key": (b'{"block_out_channels": [1]}', "block_out_channels: "),
    "a long unknown key": (b'{"' + b"k" * 60_000 + b'": 1}', r"k{100}: "),
    "a UNet's": (b'{"_class_name": "ControlNetModel"}', "_class_name is not FluxControlNetModel"),
    "a nameless class": (b'{"_class_name": ["FluxControlNetModel"]}', "_class_name"),
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
    ("field", "value"),
    [
        ("num_layers", 3),
        ("num_single_layers", 2),
        ("attention_head_dim", 32),
        ("num_attention_heads", 24),
        ("joint_attention_dim", 4096),
        ("pooled_projection_dim", 768),
        ("in_channels", 128),
        ("guidance_embeds", False),
        ("num_mode", 10),
        ("conditioning_embedding_channels", None),
        ("patch_size", 1),  # of a net that reads pixels
    ],
)
def test_a_config_that_contradicts_the_file_is_refused(field: str, value: Any, base: Any, path: Path) -> None:
    net = controlnets.build("XLabs")
    write(path, net.state_dict())
    config = config_of(net).model_copy(update={field: value})

    with pytest.raises(AssetError, match=f"says that {field} is {value}, .* {getattr(net.config, field)}"):
        load(path, base, config)


def test_what_tensors_do_not_tell_comes_from_the_config_or_the_base(base: Any, path: Path) -> None:
    net = controlnets.build("InstantX", axes_dims_rope=(2, 6, 8), patch_size=4)
    write(path, net.state_dict())

    told, untold = load(path, base, config_of(net)), load(path, base)

    assert (told.config.axes_dims_rope, told.config.patch_size) == ((2, 6, 8), 4)
    assert (untold.config.axes_dims_rope, untold.config.patch_size) == (WIDTHS["axes_dims_rope"], 1)
    for mine, expected in zip(answer(told), answer(net), strict=True):
        assert torch.equal(mine, expected)
    assert not torch.equal(answer(untold)[0], answer(net)[0])
