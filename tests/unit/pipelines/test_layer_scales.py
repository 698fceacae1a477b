"""A request's map of layers to scales: every spelling of a name, or its beginning, reaches its layers."""

import time
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipelines.flux import lora_keys
from pipelines.flux.lora_keys import layer_scales
from schemas.errors import AssetError
from tests.support import lora_files
from tests.support.lora_files import Shapes

BLOCK = "transformer.transformer_blocks.0"
SINGLE = "transformer.single_transformer_blocks.1"


@pytest.fixture(scope="module")
def targets(stock: Any) -> Shapes:
    return lora_keys.targets(stock.transformer, stock.text_encoder, stock.text_encoder_2)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        # diffusers' names, with and without the component
        ("transformer.transformer_blocks.0.attn.to_q", [f"{BLOCK}.attn.to_q"]),
        ("transformer_blocks.0.attn.to_q", [f"{BLOCK}.attn.to_q"]),
        ("base_model.model.transformer_blocks.0.attn.to_q", [f"{BLOCK}.attn.to_q"]),
        ("x_embedder", ["transformer.x_embedder"]),
        # the original's, of which some fuse several layers
        ("img_in", ["transformer.x_embedder"]),
        ("diffusion_model.img_in", ["transformer.x_embedder"]),
        ("double_blocks.0.img_attn.qkv", [f"{BLOCK}.attn.to_{part}" for part in "qkv"]),
        ("single_blocks.1.linear2", [f"{SINGLE}.proj_out"]),
        (
            "diffusion_model.single_blocks.1.linear1",
            [f"{SINGLE}.attn.to_{part}" for part in "qkv"] + [f"{SINGLE}.proj_mlp"],
        ),
        # beginnings
        ("double_blocks.0.img_attn", [f"{BLOCK}.attn.to_{part}" for part in ("q", "k", "v", "out.0")]),
        (
            "time_text_embed.text_embedder",
            [f"transformer.time_text_embed.text_embedder.linear_{n}" for n in (1, 2)],
        ),
        ("vector_in", [f"transformer.time_text_embed.text_embedder.linear_{n}" for n in (1, 2)]),
        # trainers' flat names
        ("lora_unet_double_blocks_0_img_attn_proj", [f"{BLOCK}.attn.to_out.0"]),
    ],
)
def test_a_name_reaches_its_layers(name: str, layers: list[str], targets: Shapes) -> None:
    assert layer_scales({name: 0.5}, targets) == dict.fromkeys(layers, 0.5)


@pytest.mark.parametrize(
    ("names", "beginning"),
    [
        (["transformer_blocks.0", "double_blocks.0", "diffusion_model.double_blocks.0"], f"{BLOCK}."),
        (
            ["single_blocks", "transformer.single_transformer_blocks"],
            "transformer.single_transformer_blocks.",
        ),
        (["transformer"], "transformer."),
        (["text_encoder"], "text_encoder."),
        (["text_encoder_2", "text_encoders.t5xxl"], "text_encoder_2."),
    ],
)
def test_a_beginning_reaches_all_that_it_begins(names: list[str], beginning: str, targets: Shapes) -> None:
    layers = [target for target in targets if target.startswith(beginning)]
    for name in names:
        assert layer_scales({name: -1.5}, targets) == dict.fromkeys(layers, -1.5)


def test_a_beginning_ends_at_a_dot(targets: Shapes) -> None:
    with pytest.raises(AssetError, match="transformer_blocks.0.attn.to$|transformer_blocks.0.attn.to\\."):
        layer_scales({"transformer_blocks.0.attn.to": 1.0}, targets)


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_names_fewer_layers_wins_in_any_order_and_spelling(shuffle: bool, targets: Shapes) -> None:
    wish = {
        "transformer": 0.1,
        "diffusion_model.double_blocks": 0.2,
        "transformer_blocks.0": 0.3,
        "double_blocks.0.img_attn.qkv": 0.4,
        "transformer.transformer_blocks.0.attn.to_q": 0.5,
        "transformer_blocks.0.norm1": 0.6,
        "transformer_blocks.0.norm1.linear": 0.7,  # the same layer, by the longer name
    }
    scales = layer_scales(dict(reversed(wish.items())) if shuffle else wish, targets)
    assert scales["transformer.x_embedder"] == 0.1
    assert scales["transformer.transformer_blocks.1.attn.to_q"] == 0.2
    assert scales[f"{BLOCK}.attn.to_out.0"] == 0.3
    assert scales[f"{BLOCK}.attn.to_k"] == 0.4
    assert scales[f"{BLOCK}.attn.to_q"] == 0.5
    assert scales[f"{BLOCK}.norm1.linear"] == 0.7
    assert scales.keys() == {target for target in targets if target.startswith("transformer.")}


@pytest.mark.parametrize(
    "name",
    [
        "double_blocks.7",
        "transformer_blocks.00",
        "conv_in",
        "transformer.",
        "",
        "transformer_blocks.0.attn.norm_q",  # a norm has no scale
        "transformer_blocks.0.attn.to_q.lora_A.weight",
        "é" * 1000,
    ],
)
def test_names_of_no_layer_are_refused_by_name(name: str, targets: Shapes) -> None:
    with pytest.raises(AssetError) as refusal:
        layer_scales({name: 1.0, "img_in": 1.0, "nowhere": 0.0}, targets)
    assert f"{name}, nowhere." in refusal.value.message and "img_in" not in refusal.value.message
    assert refusal.value.kind == "invalid_weights"


def test_nothing_asked_for_is_nothing(targets: Shapes) -> None:
    assert layer_scales({}, targets) == {}


@settings(max_examples=50)
@given(data=st.data())
def test_among_beginnings_of_one_spelling_the_longest_wins(data: st.DataObject, targets: Shapes) -> None:
    beginnings = sorted({".".join(target.split(".")[:n]) for target in targets for n in range(1, 9)})
    wish = data.draw(st.dictionaries(st.sampled_from(beginnings), st.floats(-4, 4), max_size=20))
    expected = {}
    for target in targets:
        fitting = [name for name in wish if f"{target}.".startswith(f"{name}.")]
        if fitting:
            expected[target] = wish[max(fitting, key=len)]
    assert layer_scales(wish, targets) == expected


def test_2000_names_for_the_full_size_model_take_milliseconds() -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    targets = lora_keys.targets(transformer, nn.Module(), nn.Module())
    names = list(targets)
    names += [name.removeprefix("transformer.") for name in targets]
    names += [
        prefix + name for name, _ in lora_files.original_names(targets) for prefix in ("", "diffusion_model.")
    ]
    names += [name.rpartition(".")[0] for name in names]
    wish = dict.fromkeys([name for name in names if name][:2000], 0.5)

    start = time.thread_time()
    assert layer_scales(wish, targets) == dict.fromkeys(targets, 0.5)
    assert time.thread_time() - start < 10
