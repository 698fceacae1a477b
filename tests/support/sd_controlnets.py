"""Tiny UNets of SD's kinds, ControlNets of every kind that is published for them, and their files.

The names stand here a second time on purpose: they are what the files of others look like.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

HEIGHT, WIDTH = 6, 10  # of the latents: halves of 3 and 5, and quarters that are rounded up
TOKENS = 4

# The arguments that UNet and ControlNet share.
_SD: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_SDXL: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": 40,
    "attention_head_dim": (2, 4, 8),
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
BASES: dict[str, dict[str, Any]] = {
    "sd1": _SD,
    "sd2": _SD | {"cross_attention_dim": 32, "attention_head_dim": (2, 4), "use_linear_projection": True},
    "sdxl": _SDXL,
}
_PLAIN = ("DownBlock2D",) * 3
# What each kind changes in its base's encoder.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("sd1", {}),
    "shuffle": ("sd1", {"global_pool_conditions": True}),
    "bgr": ("sd1", {"controlnet_conditioning_channel_order": "bgr"}),
    "sd2": ("sd2", {}),
    "sdxl": ("sdxl", {}),
    "sdxl mid": ("sdxl", {"transformer_layers_per_block": (1, 0, 1)}),
    "sdxl small": ("sdxl", {"down_block_types": _PLAIN, "transformer_layers_per_block": (1, 1, 0)}),
    "sdxl without attention": (
        "sdxl",
        {
            "down_block_types": _PLAIN,
            "transformer_layers_per_block": (1, 1, 1),
            "mid_block_type": "UNetMidBlock2D",
            "use_linear_projection": False,
        },
    ),
}


def base(name: str, **changes: Any) -> Any:
    """A UNet."""
    return stirred(UNet2DConditionModel(**(_with_decoder(BASES[name]) | changes)), seed=1)


def autoencoder() -> Any:
    """One that shrinks by 8."""
    return stirred(
        AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ),
        seed=5,
    )


def arguments(kind: str) -> dict[str, Any]:
    """A ControlNet's, as its config.json says."""
    name, changes = KINDS[kind]
    return BASES[name] | {"conditioning_embedding_out_channels": (4, 6, 8, 10)} | changes


def build(kind: str, seed: int = 2, **changes: Any) -> Any:
    return stirred(ControlNetModel(**(arguments(kind) | changes)), seed)


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


def _with_decoder(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's arguments: its decoder mirrors its encoder."""
    down = arguments.get("down_block_types", (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"))
    return {**arguments, "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(down))}


def inputs(name: str, rows: int, seed: int = 3) -> dict[str, Any]:
    """What the UNet of a base is called with."""
    generator = torch.Generator("cpu").manual_seed(seed)
    arguments = BASES[name]
    added = {
        "text_embeds": torch.randn(rows, 32, generator=generator),
        "time_ids": torch.rand(rows, 6, generator=generator) * 64,
    }
    return {
        "sample": torch.randn(rows, 4, HEIGHT, WIDTH, generator=generator),
        "timestep": torch.rand(rows, generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(
            rows, TOKENS, arguments["cross_attention_dim"], generator=generator
        ),
        "added_cond_kwargs": added if "addition_embed_type" in arguments else None,
    }


def image(seed: int = 4) -> Tensor:
    """A control image."""
    return torch.rand(3, 8 * HEIGHT, 8 * WIDTH, generator=torch.Generator("cpu").manual_seed(seed))


# The original's names (https://github.com/lllyasviel/ControlNet, cldm/cldm.py): what is added to a UNet's.
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.blocks.0": "input_hint_block.2",
    "controlnet_cond_embedding.blocks.1": "input_hint_block.4",
    "controlnet_cond_embedding.blocks.2": "input_hint_block.6",
    "controlnet_cond_embedding.blocks.3": "input_hint_block.8",
    "controlnet_cond_embedding.blocks.4": "input_hint_block.10",
    "controlnet_cond_embedding.blocks.5": "input_hint_block.12",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    "controlnet_mid_block": "middle_block_out.0",
    "mid_block.attentions.0": "middle_block.1",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def in_diffusers_names(net: Any) -> dict[str, Tensor]:
    return dict(net.state_dict())


def in_original_names(net: Any) -> dict[str, Tensor]:
    modules = dict(_modules(net))
    renamed: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        module = next(each for each in modules if name.startswith(f"{each}."))
        renamed[modules[module] + name.removeprefix(module)] = tensor
    return renamed


def in_a_checkpoint(net: Any) -> dict[str, Tensor]:
    """As the original code saves it."""
    return {f"control_model.{name}": tensor for name, tensor in in_original_names(net).items()}


LAYOUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "diffusers": in_diffusers_names,
    "original": in_original_names,
    "original checkpoint": in_a_checkpoint,
}


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _modules(net: Any) -> Iterator[tuple[str, str]]:
    """diffusers' modules with the original's names; it counts all layers of the encoder in one row."""
    yield from _OUTSIDE.items()
    number = 0
    for b, block in enumerate(net.down_blocks):
        for n in range(len(block.resnets)):
            number += 1
            yield from _resnet(f"down_blocks.{b}.resnets.{n}", f"input_blocks.{number}.0")
            yield f"down_blocks.{b}.attentions.{n}", f"input_blocks.{number}.1"
        if block.downsamplers:
            number += 1
            yield f"down_blocks.{b}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
    for n in range(number + 1):
        yield f"controlnet_down_blocks.{n}", f"zero_convs.{n}.0"
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    yield from _resnet("mid_block.resnets.1", "middle_block.2")


def _resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for our_layer, their_layer in _RESNET.items():
        yield f"{ours}.{our_layer}", f"{theirs}.{their_layer}"


_SDXL_NET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Published nets: their arguments where they are not ControlNetModel's defaults, and what they were made for.
FULL_SIZE: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5": ("SD 1.5", {"cross_attention_dim": 768}),
    "SD 2.1": (
        "SD 2.1",
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    ),
    "SDXL": ("SDXL", _SDXL_NET),
    "SDXL mid": ("SDXL", _SDXL_NET | {"transformer_layers_per_block": (0, 0, 1)}),
    "SDXL small": (
        "SDXL",
        _SDXL_NET | {"down_block_types": _PLAIN, "transformer_layers_per_block": (0, 0, 0)},
    ),
}


def full_size(name: str) -> Any:
    """A published net, without values."""
    with torch.device("meta"):
        return ControlNetModel(**FULL_SIZE[name][1])


def full_size_base(name: str) -> Any:
    """The UNet that a published net was made for, without values."""
    base, _ = FULL_SIZE[name]
    _, arguments = FULL_SIZE[base]
    with torch.device("meta"):
        return UNet2DConditionModel(**_with_decoder(arguments))
