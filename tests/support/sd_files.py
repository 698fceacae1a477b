"""Stable Diffusion in one file, as CompVis' and Stability AI's code names its tensors.

The names stand here a second time on purpose: they are what the files of others look like.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines.sd.parts import Parts

Tensors = dict[str, Tensor]


def write(
    parts: Parts, path: Path, notes: Mapping[str, str] | None = None, more: Mapping[str, Tensor] | None = None
) -> Path:
    """A whole model, with what else such files hold, and more tensors if given."""
    save_file(original(parts) | dict(more or {}), path, dict(notes or {}))
    return path


def original(parts: Parts) -> Tensors:
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet(parts.unet).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae(parts.vae).items()}
    match parts.kind:
        case "sd1":
            tensors |= clip(parts.text_encoders[0], "cond_stage_model.transformer.")
        case "sd2":
            tensors |= open_clip(parts.text_encoders[0], "cond_stage_model.model.", stops_early=True)
        case "sdxl":
            tensors |= clip(parts.text_encoders[0], "conditioner.embedders.0.transformer.")
            tensors |= open_clip(parts.text_encoders[1], "conditioner.embedders.1.model.")
    return tensors | {"alphas_cumprod": torch.linspace(1, 0, 1000), "betas": torch.linspace(0, 1, 1000)}


def unet(module: Any) -> Tensors:
    places = dict(_unet_places(module))
    return {_placed(name, places): tensor.contiguous() for name, tensor in module.state_dict().items()}


def _unet_places(module: Any) -> Iterator[tuple[str, str]]:
    """diffusers' beginnings of names, each with the original's."""
    yield from _UNET_ENDS.items()
    number = 1
    for index, block in enumerate(module.down_blocks):
        for layer in range(len(block.resnets)):
            yield f"down_blocks.{index}.resnets.{layer}", f"input_blocks.{number}.0"
            yield f"down_blocks.{index}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        yield f"down_blocks.{index}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for index, block in enumerate(module.up_blocks):
        for layer in range(len(block.resnets)):
            yield f"up_blocks.{index}.resnets.{layer}", f"output_blocks.{number}.0"
            yield f"up_blocks.{index}.attentions.{layer}", f"output_blocks.{number}.1"
            number += 1
        attends = hasattr(block, "attentions")
        yield f"up_blocks.{index}.upsamplers.0.conv", f"output_blocks.{number - 1}.{1 + attends}.conv"


_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _placed(name: str, places: Mapping[str, str]) -> str:
    ours = next(each for each in places if name.startswith(f"{each}."))
    rest = name.removeprefix(ours)
    if ".resnets." in ours:
        first, _, kind = rest[1:].partition(".")
        rest = f".{_RESNET[first]}.{kind}"
    return places[ours] + rest


def vae(module: Any) -> Tensors:
    count = len(module.config.up_block_types)
    return dict(_vae_tensor(name, tensor, count) for name, tensor in module.state_dict().items())


def _vae_tensor(name: str, tensor: Tensor, blocks: int) -> tuple[str, Tensor]:
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(
        r"up_blocks\.(\d)\.(resnets\.)?",
        lambda match: f"up.{blocks - 1 - int(match[1])}." + ("block." if match[2] else ""),
        name,
    )
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = name.replace("upsamplers.0.", "upsample.").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = name.replace("conv_shortcut", "nin_shortcut")
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
        name = re.sub(r"to_([qkv])", r"\1", name).replace("to_out.0", "proj_out")
        if tensor.ndim == 2:  # a 1×1 convolution there
            tensor = tensor[:, :, None, None]
    return name, tensor.contiguous()


def clip(module: Any, prefix: str) -> Tensors:
    """OpenAI's encoder, as transformers named it until 5.6."""
    tensors = {f"{prefix}text_model.{name}": tensor for name, tensor in module.state_dict().items()}
    return tensors | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip(module: Any, prefix: str, stops_early: bool = False) -> Tensors:
    """OpenCLIP's encoder. One that stops early has a layer more, which nothing reads."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}
    found = {ours: state[theirs] for ours, theirs in _OPEN_CLIP_ENDS.items()}
    for number in range(module.config.num_hidden_layers):
        found |= _resblock(state, f"encoder.layers.{number}.", f"transformer.resblocks.{number}.")
    if stops_early:
        last = module.config.num_hidden_layers - 1
        found |= _resblock(state, f"encoder.layers.{last}.", f"transformer.resblocks.{last + 1}.")
    width = module.config.hidden_size
    projection = state.get("text_projection.weight")
    found["text_projection"] = torch.zeros(width, width) if projection is None else projection.T
    found["logit_scale"] = torch.tensor(4.6)
    return {
        prefix + name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()
    }


_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_RESBLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _resblock(state: Tensors, ours: str, theirs: str) -> Tensors:
    found: Tensors = {}
    for kind in ("weight", "bias"):
        found |= {f"{theirs}{new}.{kind}": state[f"{ours}{old}.{kind}"] for new, old in _RESBLOCK.items()}
        qkv = [state[f"{ours}self_attn.{each}_proj.{kind}"] for each in "qkv"]
        found[f"{theirs}attn.in_proj_{kind}"] = torch.cat(qkv)
    return found


def write_hollow(shapes: Mapping[str, tuple[int, ...]], path: Path, dtype: str = "F16") -> Path:
    """A file with this header whose data takes no room on the disk: zeros that were never written."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path
