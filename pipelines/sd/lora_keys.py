"""The names that Stable Diffusion LoRAs, and requests about them, give to layers.

Trainers name a UNet's layer as diffusers does or as the original code does, which SDXL's kept
(https://github.com/CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py), and a text
encoder's as transformers does; with one of several prefixes, with dots or with underscores for dots.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count, takewhile, zip_longest
from typing import Any

from torch.nn import Conv2d, Linear

from pipelines.adapters import lora_names
from pipelines.adapters.lora import Destination, Shapes, Translate
from pipelines.adapters.lora_names import Named, Prefixes, beginnings, with_or_without

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

_PREFIXES = {
    "unet": Prefixes(("", "unet.", "diffusion_model."), ("lora_unet_", "lycoris_")),
    "text_encoder": Prefixes(
        ("text_encoder.", "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
        ("lora_te_", "lora_te1_"),
    ),
    "text_encoder_2": Prefixes(("text_encoder_2.", "text_encoders.clip_g.transformer."), ("lora_te2_",)),
}

# The original's names of layers outside of blocks, and by kind of module of those inside where they differ.
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_INSIDE = {
    "resnets": {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
}


def targets(unet: Any, text_encoders: Sequence[Any]) -> Shapes:
    """Every layer that may carry a LoRA, "component.path", with its weight's shape."""
    components = {"unet": unet, **dict(zip(_TEXT_ENCODERS, text_encoders, strict=False))}
    return {
        f"{component}.{path}": tuple(module.weight.shape)
        for component, model in components.items()
        for path, module in model.named_modules()
        if isinstance(module, Linear) or (isinstance(module, Conv2d) and module.groups == 1)
    }


def translator(targets: Shapes) -> Translate:
    """The translator for a model with these targets."""
    return lora_names.translator(lora_names.spellings(targets, _PREFIXES, _names))


def layer_scales(wish: Mapping[str, float], targets: Shapes) -> Mapping[str, float]:
    """The scale of each target that a request's map of names to scales sets; see lora_names."""
    return lora_names.layer_scales(wish, lora_names.spellings(targets, _PREFIXES, _names))


def _names(component: str, paths: list[str]) -> Iterator[Named]:
    """A component's layers by all their names, without prefixes."""
    alternatives = _text_names if component in _TEXT_ENCODERS else _unet_names
    for name, path in alternatives(paths):
        yield name, Destination((f"{component}.{path}",))


def _text_names(paths: list[str]) -> Iterator[tuple[str, str]]:
    for path in paths:
        # transformers 5.6 dropped the wrapper of CLIPTextModel; files have either
        for name in (path, with_or_without("text_model", path)):
            yield name, path
            if "self_attn" in name:  # as diffusers named it until 2023
                yield re.sub(r"\.(q|k|v|out)_proj$", r".to_\1_lora", name), path


def _unet_names(paths: list[str]) -> Iterator[tuple[str, str]]:
    for path in paths:
        yield path, path
        if match := re.search(r"\.(to_[qkv]|to_out)(\.0)?$", path):  # as diffusers named it until 2023
            yield f"{path[: match.start()]}.processor.{match[1]}_lora", path
    yield from _original_names(paths)


def _original_names(paths: list[str]) -> Iterator[tuple[str, str]]:
    originals = dict(_original_modules({each for path in paths for each in beginnings(path)}))
    for path in paths:
        if path in _OUTSIDE:
            yield _OUTSIDE[path], path
        for module in beginnings(path):
            if module in originals:
                kind, layer = module.split(".")[-2], path.removeprefix(f"{module}.")
                yield f"{originals[module]}.{_INSIDE.get(kind, {}).get(layer, layer)}", path


def _original_modules(known: Collection[str]) -> Iterator[tuple[str, str]]:
    """The resnets, attentions, downsamplers and upsamplers of a UNet, with the original's names for them.

    diffusers nests them in blocks, by kind; the original has a list of rows on the way down, a row in the
    middle, and a list on the way up. A row is a resnet with its attention, if it has one; a downsampler is a
    row of its own, an upsampler ends its block's last row. `known` are all modules of the UNet.
    """
    down: list[list[str]] = []
    for block in _numbered("down_blocks", known):
        down += _rows(block, known)
        down += [[sampler] for sampler in _numbered(f"{block}.downsamplers", known)]
    up: list[list[str]] = []
    for block in _numbered("up_blocks", known):
        up += _rows(block, known)
        up[-1] += _numbered(f"{block}.upsamplers", known)
    rows = {f"input_blocks.{number}": row for number, row in enumerate(down, 1)}  # conv_in is the first
    rows["middle_block"] = [module for row in _rows("mid_block", known) for module in row]
    rows |= {f"output_blocks.{number}": row for number, row in enumerate(up)}
    for name, row in rows.items():
        yield from ((module, f"{name}.{place}") for place, module in enumerate(row))


def _rows(block: str, known: Collection[str]) -> list[list[str]]:
    """A block's resnets, each with the attention of the same number, if there is one."""
    attentions = _numbered(f"{block}.attentions", known)
    pairs = zip_longest(_numbered(f"{block}.resnets", known), attentions)
    return [[module for module in pair if module] for pair in pairs]


def _numbered(name: str, known: Collection[str]) -> list[str]:
    """ "name.0", "name.1" and so on, as far as there are."""
    return list(takewhile(known.__contains__, (f"{name}.{number}" for number in count())))
