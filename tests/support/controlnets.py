"""Tiny ControlNets of every kind that is published, a base for them, and their files in each layout.

The names stand here a second time on purpose: they are what the files of others look like.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from pipelines.flux.sampling import Grid, image_ids

GRID = Grid(2, 3)
TOKENS = GRID.tokens
TEXT_TOKENS = 4

WIDTHS = {
    "in_channels": 64,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
BLOCKS, SINGLE_BLOCKS = 5, 7
PIXELS = {"conditioning_embedding_channels": 16, "patch_size": 2}

# What makes each kind what it is.
KINDS: dict[str, dict[str, Any]] = {
    "InstantX": {"num_layers": 2, "num_single_layers": 0, "guidance_embeds": True},
    "union": {"num_layers": 2, "num_single_layers": 3, "guidance_embeds": True, "num_mode": 10},
    "union 2.0": {"num_layers": 3, "num_single_layers": 0, "guidance_embeds": True},
    "XLabs": {"num_layers": 2, "num_single_layers": 0, "guidance_embeds": True, **PIXELS},
    "pixels and single blocks": {
        "num_layers": 2,
        "num_single_layers": 2,
        "guidance_embeds": True,
        **PIXELS,
    },
    "single blocks only": {"num_layers": 0, "num_single_layers": 2, "guidance_embeds": True},
    "no guidance": {"num_layers": 5, "num_single_layers": 7, "guidance_embeds": False},
}


def base(**changes: Any) -> Any:
    """A FLUX.1-dev of five double and seven single blocks."""
    blocks = {"num_layers": BLOCKS, "num_single_layers": SINGLE_BLOCKS, "guidance_embeds": True}
    return stirred(FluxTransformer2DModel(**(WIDTHS | blocks | changes)), seed=1)


def build(kind: str, seed: int = 2, **changes: Any) -> Any:
    return stirred(empty(**(WIDTHS | KINDS[kind] | changes)), seed)


def empty(**arguments: Any) -> Any:
    with warnings.catch_warnings():
        # diffusers 0.42 warns of where it itself imports this class from
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        return FluxControlNetModel(**arguments)


@torch.no_grad()
def stirred(model: Any, seed: int) -> Any:
    """All weights random: a new ControlNet's own begin at zero, and it does nothing."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(noise / 10 + ("norm" in name and name.endswith("weight")))
    return model.eval().requires_grad_(False)


def inputs(rows: int, seed: int = 3) -> dict[str, Any]:
    """What the transformer is called with."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return {
        "hidden_states": torch.randn(rows, TOKENS, 64, generator=generator),
        "encoder_hidden_states": torch.randn(rows, TEXT_TOKENS, 32, generator=generator),
        "pooled_projections": torch.randn(rows, 32, generator=generator),
        "timestep": torch.rand(rows, generator=generator),
        "guidance": 1 + 4 * torch.rand(rows, generator=generator),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "img_ids": image_ids(GRID),
    }


def image(net: Any, seed: int = 4) -> Tensor:
    """What the net reads for a picture on GRID."""
    generator = torch.Generator("cpu").manual_seed(seed)
    if net.input_hint_block is None:
        return torch.randn(TOKENS, 64, generator=generator)
    return torch.rand(3, GRID.height, GRID.width, generator=generator) * 2 - 1


# XLabs' names, which are Black Forest Labs', and the tensors of diffusers whose rows they stack: those of
# flux-canny-controlnet_v2.safetensors; the single blocks' are those of FLUX.1-dev's own file.
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "pos_embed_input": "controlnet_x_embedder",
    "input_hint_block.0": "input_hint_block.conv_in",
    "input_hint_block.2": "input_hint_block.blocks.0",
    "input_hint_block.4": "input_hint_block.blocks.1",
    "input_hint_block.6": "input_hint_block.blocks.2",
    "input_hint_block.8": "input_hint_block.blocks.3",
    "input_hint_block.10": "input_hint_block.blocks.4",
    "input_hint_block.12": "input_hint_block.blocks.5",
    "input_hint_block.14": "input_hint_block.conv_out",
}
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def in_diffusers_names(net: Any) -> dict[str, Tensor]:
    return dict(net.state_dict())


def in_original_names(net: Any) -> dict[str, Tensor]:
    tensors = dict(net.state_dict())
    renamed = {name: torch.cat([tensors.pop(part) for part in parts]) for name, parts in _stacks(net)}
    return tensors | renamed  # what is left bears the same name in both


LAYOUTS = {"diffusers": in_diffusers_names, "original": in_original_names}


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _stacks(net: Any) -> Iterator[tuple[str, list[str]]]:
    names = net.state_dict().keys()
    for theirs, ours in _OUTSIDE.items():
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in names:
                yield f"{theirs}.{kind}", [f"{ours}.{kind}"]
    yield from _blocks("double_blocks", "transformer_blocks", net.config.num_layers, _DOUBLE, _DOUBLE_NORMS)
    count = net.config.num_single_layers
    yield from _blocks("single_blocks", "single_transformer_blocks", count, _SINGLE, _SINGLE_NORMS)


def _blocks(
    theirs: str, ours: str, count: int, layers: Mapping[str, tuple[str, ...]], norms: Mapping[str, str]
) -> Iterator[tuple[str, list[str]]]:
    for number in range(count):
        for name, norm in norms.items():
            yield f"{theirs}.{number}.{name}.scale", [f"{ours}.{number}.{norm}.weight"]
        for name, parts in layers.items():
            for kind in ("weight", "bias"):
                yield f"{theirs}.{number}.{name}.{kind}", [f"{ours}.{number}.{part}.{kind}" for part in parts]
