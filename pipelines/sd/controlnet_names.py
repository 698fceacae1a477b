"""The names that files of ControlNets for SD give to tensors.

A file names them as diffusers does, or as the original code does (https://github.com/lllyasviel/ControlNet,
cldm/cldm.py), whose names SDXL's code kept.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable


def names(keys: Iterable[str]) -> dict[str, str]:
    """A file's keys, each with diffusers' name for the tensor; keys of other kinds stay as they are."""
    originals = {key: key.removeprefix("control_model.") for key in keys}
    downs = sorted(int(match[1]) for key in originals.values() if (match := _DOWN.fullmatch(key)))
    return {key: _name(original, downs) for key, original in originals.items()}


# The original's names of layers, outside of blocks and inside of resnets.
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    **{f"input_hint_block.{2 * n + 2}": f"controlnet_cond_embedding.blocks.{n}" for n in range(6)},
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
    "middle_block_out.0": "controlnet_mid_block",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_DOWN = re.compile(r"input_blocks\.([1-9]\d{0,3})\.0\.op\.weight")
_INPUT = re.compile(r"input_blocks\.(?P<row>[1-9]\d{0,3})\.(?P<part>[01])\.(?P<layer>.+)")
_MIDDLE = re.compile(r"middle_block\.(?P<part>[012])\.(?P<layer>.+)")
_ZERO = re.compile(r"zero_convs\.(0|[1-9]\d{0,3})\.0")


def _name(key: str, downs: list[int]) -> str:
    """diffusers' name. The original has its encoder in rows; those of `downs` are downsamplers."""
    layer, _, kind = key.rpartition(".")
    if layer in _OUTSIDE:
        return f"{_OUTSIDE[layer]}.{kind}"
    if match := _ZERO.fullmatch(layer):
        return f"controlnet_down_blocks.{match[1]}.{kind}"
    if match := _INPUT.fullmatch(layer):
        row = int(match["row"])
        block = bisect_left(downs, row)
        place = row - 1 - (downs[block - 1] if block else 0)
        return f"down_blocks.{block}.{_inside(int(match['part']), place, match['layer'])}.{kind}"
    if match := _MIDDLE.fullmatch(layer):
        place, part = divmod(int(match["part"]), 2)
        return f"mid_block.{_inside(part, place, match['layer'])}.{kind}"
    return key


def _inside(part: int, place: int, layer: str) -> str:
    """A layer of the first or second part of a row: a resnet or downsampler, and an attention."""
    if part:
        return f"attentions.{place}.{layer}"
    return "downsamplers.0.conv" if layer == "op" else f"resnets.{place}.{_RESNET.get(layer, layer)}"
