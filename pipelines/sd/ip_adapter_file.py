"""IP-Adapters for SD, from files that come from outside.

A file has a projection (`image_proj.…`) and, numbered by the UNet's attention modules, weights for keys and
values (`ip_adapter.1.to_k_ip.weight` …). Training scripts call the two image_proj_model and adapter_modules.
FaceID's have LoRAs for the attention as well. The names tell which kind of projection it is, the shapes all
sizes; diffusers' `_convert_ip_adapter_image_proj_to_diffusers` is the reference for both.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFaceIDPlusImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from torch import Tensor

from pipelines.adapters import tensor_file
from pipelines.adapters.lora import MAX_RANK, Lora, LoraLayer
from pipelines.adapters.tensor_file import check_finite, invalid, listed
from pipelines.sd.image_attention import Pair, cross_attention
from pipelines.sd.ip_adapter import IpAdapter, IpAdapterKind, Reads

MAX_LAYERS = 16  # of a resampler; all published have 4

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, Tensor]


def load(path: Path, unet: UNet2DConditionModel) -> IpAdapter:
    """The IP-Adapter of a file, on the UNet's device and in its dtype; its LoRA, if any, is on the CPU.

    All or nothing: each tensor must have a place and fit it, and none may be missing. Raises AssetError
    ("invalid_weights") that says what the file is instead, or names the keys.
    """
    file = tensor_file.read(path)
    plan = architecture(file.shapes, unet)
    tensors = file.load()
    device, dtype = unet.device, unet.dtype  # diffusers walks through all modules to find these
    lora = _lora(plan.loras, tensors)
    own = {key: tensors[key].to(device, dtype) for key in plan.own}
    check_finite(own)
    named = {name: own[key] for name, key in plan.projection.items()}
    plan.module.load_state_dict(_renamed(plan.kind, named), assign=True)
    weights: tuple[Pair, ...] = tuple((own[key], own[value]) for key, value in plan.pairs)
    return IpAdapter(plan.kind, plan.reads, lora, plan.module.eval().requires_grad_(False), weights)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a file holds, and which of its keys is what."""

    kind: IpAdapterKind
    reads: Reads
    module: Any  # the projection, without values
    projection: Mapping[str, str]  # the projection's names in files → keys
    pairs: tuple[tuple[str, str], ...]  # keys of keys and of values, by cross-attention module
    loras: Mapping[str, tuple[str, str]]  # layers of the UNet, as LoRAs name them → keys of down and up

    @property
    def own(self) -> list[str]:
        """The keys of all but the LoRAs."""
        return [*self.projection.values(), *(key for pair in self.pairs for key in pair)]


def architecture(shapes: Shapes, unet: UNet2DConditionModel) -> Architecture:
    """What a file with these tensors holds, if it fits this UNet. Raises AssetError where it does not."""
    contents = _sorted(shapes)
    given = {name: torch.empty(shapes[key], device="meta") for name, key in contents.projection.items()}
    kind = _kind(given)
    named = {name: tuple(tensor.shape) for name, tensor in _renamed(kind, given).items()}
    with torch.device("meta"):
        module, width, reads = _projection(kind, named)
    _check_base(width, unet)
    _check_projection(named, module)
    pairs = _pairs(contents, shapes, unet)
    loras = _lora_keys(contents, shapes, unet)
    return Architecture(kind, reads, module, contents.projection, pairs, loras)


@dataclass(frozen=True, slots=True)
class _Contents:
    """A file's keys by what they are: the projection's by name, the rest by number and layer."""

    projection: dict[str, str] = field(default_factory=dict)
    weights: dict[tuple[int, str], str] = field(default_factory=dict)  # (1, "to_k")
    loras: dict[tuple[int, str, str], str] = field(default_factory=dict)  # (0, "to_q", "down")


_KEY = re.compile(
    r"image_proj(_model)?\.(?P<projection>.+)"
    r"|(ip_adapter|adapter_modules)\.(?P<number>\d{1,4})\."
    r"((?P<weight>to_[kv])_ip|(?P<lora>to_(q|k|v|out))_lora\.(?P<side>down|up))\.weight"
)

# What others call their files' tensors, and what is wrong with those files here.
_OTHER_KINDS = {
    r"^lora_|\.lora_|_lora\.(down|up)\.|\.processor\..*_lora": "is a LoRA, not an IP-Adapter",
    r"ip_adapter_double_stream|^ip_adapter_proj_model\.": "is an IP-Adapter for FLUX, not for SD",
    r"^vision_model\.": "is an image encoder, not an IP-Adapter",
    r"input_hint_block|controlnet_cond_embedding": "is a ControlNet, not an IP-Adapter",
    r"^(adapter\.)?body\.\d": "is a T2I-Adapter, not an IP-Adapter",
    r"^(model|unet|down_blocks|input_blocks)\.": "holds a UNet; only an IP-Adapter is accepted",
}


def _sorted(shapes: Shapes) -> _Contents:
    contents = _Contents()
    matches = {key: _KEY.fullmatch(key) for key in shapes}
    for key, match in matches.items():
        if match is None:
            continue
        number = int(match["number"] or 0)
        if match["projection"]:
            _put(contents.projection, match["projection"], key)
        elif match["weight"]:
            _put(contents.weights, (number, match["weight"]), key)
        else:
            _put(contents.loras, (number, match["lora"], match["side"]), key)
    unknown = [key for key, match in matches.items() if match is None]
    if not (contents.projection and contents.weights) or unknown:
        raise _refusal(unknown, contents)
    return contents


def _put(places: dict[Any, str], place: Any, key: str) -> None:
    if place in places:
        raise invalid(f"The IP-Adapter has a tensor twice: {places[place]} and {key}.")
    places[place] = key


def _refusal(unknown: list[str], contents: _Contents) -> Exception:
    """What to say of a file with these keys that are none of an IP-Adapter's, or without those of one."""
    for pattern, fault in _OTHER_KINDS.items():
        if any(map(re.compile(pattern).search, unknown)):
            return invalid(f"The file {fault}.")
    if not contents.projection and not contents.weights:
        return invalid(
            f"The file is not an IP-Adapter. What it has is {listed(unknown or [*contents.loras.values()])}."
        )
    if unknown:
        return invalid(f"An IP-Adapter for Stable Diffusion has no place for {listed(unknown)}.")
    lacking = "ip_adapter.1.to_k_ip.weight and the like" if contents.projection else "image_proj"
    return invalid(f"The IP-Adapter is not complete. It lacks {lacking}.")


_FACE_WIDTH = 512  # of InsightFace's embeddings


def _kind(given: Tensors) -> IpAdapterKind:
    """What kind of projection has these tensors, by the names in files."""
    if "proj.weight" in given:
        return "plain"
    if "proj.3.weight" in given:
        return "full"
    if "perceiver_resampler.proj_in.weight" in given:
        return "faceid_plus"
    if "proj.0.weight" in given and "norm.weight" in given:
        return "faceid"
    if "latents" in given and "proj_in.weight" in given:
        return "instantid" if given["proj_in.weight"].shape[-1:] == (_FACE_WIDTH,) else "plus"
    raise invalid(f"The IP-Adapter's image_proj is of no known kind. What it has is {listed(given)}.")


# Beginnings of names in files, and diffusers' for them.
_MLP = {r"proj\.0\.": "ff.net.0.proj.", r"proj\.2\.": "ff.net.2."}
_RESAMPLER = {
    r"layers\.(\d+)\.0\.norm1\.": r"layers.\1.ln0.",
    r"layers\.(\d+)\.0\.norm2\.": r"layers.\1.ln1.",
    r"layers\.(\d+)\.(0|attn)\.to_out\.(0\.)?": r"layers.\1.attn.to_out.0.",
    r"layers\.(\d+)\.0\.to_": r"layers.\1.attn.to_",
    r"layers\.(\d+)\.1\.0\.": r"layers.\1.ff.0.",
    r"layers\.(\d+)\.1\.1\.": r"layers.\1.ff.1.net.0.proj.",
    r"layers\.(\d+)\.1\.3\.": r"layers.\1.ff.1.net.2.",
}
_NAMES: Mapping[IpAdapterKind, Mapping[str, str]] = {
    "plain": {r"proj\.": "image_embeds."},
    "full": _MLP | {r"proj\.3\.": "norm."},
    "faceid": _MLP,
    "plus": _RESAMPLER,
    "instantid": _RESAMPLER,
    "faceid_plus": {
        r"perceiver_resampler\.": "",
        r"proj\.0\.": "proj.net.0.proj.",
        r"proj\.2\.": "proj.net.2.",
        **_RESAMPLER,
    },
}
_BOTH = ".attn.to_kv.weight"  # keys and values in one tensor


def _renamed(kind: IpAdapterKind, given: Tensors) -> Tensors:
    """From the names and layouts of files to those of diffusers' module; on any device."""
    renamed: Tensors = {}
    for name, tensor in given.items():
        ours = name
        for pattern, replacement in _NAMES[kind].items():
            ours = re.sub(f"^{pattern}", replacement, ours)
        if ours.endswith(_BOTH):
            if tensor.ndim != 2 or len(tensor) % 2:
                raise invalid(f"The IP-Adapter's image_proj.{name} has the shape {list(tensor.shape)}.")
            parts = dict(zip(("to_k", "to_v"), tensor.chunk(2), strict=True))
        else:
            parts = {"to_kv": tensor}
        for part, each in parts.items():
            _put_tensor(renamed, ours.replace("to_kv", part), each)
    return renamed


def _put_tensor(tensors: Tensors, name: str, tensor: Tensor) -> None:
    if name in tensors:
        raise invalid(f"The IP-Adapter's image_proj has {name} under two names.")
    tensors[name] = tensor


_HEAD = 64  # the width of a resampler's heads


def _projection(kind: IpAdapterKind, named: Shapes) -> tuple[Any, int, Reads]:
    """diffusers' module for tensors of these shapes, the width of its tokens, and what it reads.

    Divisions that leave a remainder give a module that the tensors do not fit.
    """
    match kind:
        case "plain":
            (rows, read), (width,) = _sides(named, "image_embeds.weight"), _sides(named, "norm.weight")
            return ImageProjection(read, width, _quotient(rows, width)), width, Reads(embedding=read)
        case "full":
            (_, read), (width,) = _sides(named, "ff.net.0.proj.weight"), _sides(named, "norm.weight")
            return IPAdapterFullImageProjection(read, width), width, Reads(hidden=read)
        case "faceid":
            (inner, read), (width,) = _sides(named, "ff.net.0.proj.weight"), _sides(named, "norm.weight")
            tokens = _quotient(_sides(named, "ff.net.2.weight")[0], width)
            module = IPAdapterFaceIDImageProjection(read, width, _quotient(inner, read), tokens)
            return module, width, Reads(face=_face(read))
        case "plus" | "instantid":
            (_, read), (width, _) = _sides(named, "proj_in.weight"), _sides(named, "proj_out.weight")
            _, queries, hidden = _sides(named, "latents")
            module = IPAdapterPlusImageProjection(
                read, width, hidden, _depth(named), _HEAD, _heads(named), queries
            )
            reads = Reads(hidden=read) if kind == "plus" else Reads(face=read, normed_face=False)
            return module, width, reads
        case "faceid_plus":
            (width, read), (inner, face) = (
                _sides(named, name) for name in ("proj_in.weight", "proj.net.0.proj.weight")
            )
            module = IPAdapterFaceIDPlusImageProjection(
                embed_dims=width,
                output_dims=width,
                hidden_dims=read,
                id_embeddings_dim=_face(face),
                depth=_depth(named),
                dim_head=_HEAD,
                heads=_heads(named),
                num_tokens=_quotient(_sides(named, "proj.net.2.weight")[0], width),
                ffproj_ratio=_quotient(inner, face),
            )
            return module, width, Reads(hidden=read, face=face)


_AXES = {"latents": 3, "norm.weight": 1}


def _sides(named: Shapes, name: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    shape = named.get(name)
    if shape is None:
        raise invalid(f"The IP-Adapter is not complete. Its image_proj lacks {name}, as diffusers names it.")
    if len(shape) != _AXES.get(name, 2):
        raise invalid(f"The IP-Adapter's image_proj is of no known kind: {name} has the shape {list(shape)}.")
    return shape


def _quotient(whole: int, part: int) -> int:
    return max(1, whole // part)


def _face(width: int) -> int:
    if width != _FACE_WIDTH:
        raise invalid(
            f"The IP-Adapter reads faces {width} wide; those of InsightFace are {_FACE_WIDTH} wide."
        )
    return width


def _depth(named: Shapes) -> int:
    """The layers of a resampler."""
    layers = {match[1] for name in named if (match := re.match(r"layers\.(\d+)\.", name))}
    if len(layers) > MAX_LAYERS:
        raise invalid(f"The IP-Adapter's image_proj has {len(layers)} layers; at most {MAX_LAYERS} fit.")
    return len(layers)


def _heads(named: Shapes) -> int:
    return _quotient(_sides(named, "layers.0.attn.to_q.weight")[0], _HEAD)


_BASES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of their text


def _check_base(width: int, unet: UNet2DConditionModel) -> None:
    expected = unet.config.cross_attention_dim
    if width != expected:
        raise invalid(
            f"The IP-Adapter was made for {_BASES.get(width, 'another model')}: its tokens are {width} wide, "
            f"this model reads {expected}. Use one made for {_BASES.get(expected, 'this model')}."
        )


def _check_projection(named: Shapes, module: Any) -> None:
    """By diffusers' names, since what a misfit's name in the file was tells no more."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    unknown, missing = named.keys() - expected.keys(), expected.keys() - named.keys()
    if unknown:
        raise invalid(f"The IP-Adapter's image_proj has no place for {listed(sorted(unknown))}.")
    if missing:
        raise invalid(f"The IP-Adapter is not complete. Its image_proj lacks {listed(sorted(missing))}.")
    for name, shape in named.items():
        if shape != expected[name]:
            raise invalid(
                f"The IP-Adapter's image_proj does not fit together: {name} has the shape {list(shape)} "
                f"where {list(expected[name])} is expected."
            )


def _pairs(contents: _Contents, shapes: Shapes, unet: UNet2DConditionModel) -> tuple[tuple[str, str], ...]:
    """The keys of the weights for keys and values; odd numbers are cross-attention's, in diffusers' order."""
    modules = {2 * index + 1: module for index, module in enumerate(cross_attention(unet))}
    expected = {(number, layer): module for number, module in modules.items() for layer in ("to_k", "to_v")}
    found = contents.weights
    if found.keys() != expected.keys():
        raise _of_other_modules(found, expected, shapes)
    for (number, layer), key in found.items():
        weight = unet.get_submodule(modules[number]).get_submodule(layer).weight
        _check_shape(key, shapes[key], tuple(weight.shape))
    return tuple((found[number, "to_k"], found[number, "to_v"]) for number in modules)


def _of_other_modules(
    found: Mapping[tuple[int, str], str], expected: Mapping[tuple[int, str], str], shapes: Shapes
) -> Exception:
    numbers, known = {number for number, _ in found}, {number for number, _ in expected}
    if numbers != known:
        return invalid(
            f"The IP-Adapter was made for another model: it has weights for {len(numbers)} cross-attention "
            f"modules, up to number {max(numbers)}; this model has {len(known)}, up to number {max(known)}."
        )
    missing = [f"ip_adapter.{number}.{layer}_ip.weight" for number, layer in expected.keys() - found.keys()]
    return invalid(f"The IP-Adapter is not complete. It lacks {listed(sorted(missing))}.")


def _check_shape(key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise invalid(
            f"The IP-Adapter was made for another model: {key} has the shape {list(shape)} where "
            f"{list(expected)} is expected."
        )


def _lora_keys(contents: _Contents, shapes: Shapes, unet: UNet2DConditionModel) -> dict[str, tuple[str, str]]:
    """FaceID's LoRAs: layers → keys of down and up. All attention modules are counted, from 0."""
    modules = [name.removesuffix(".processor") for name in unet.attn_processors]
    layers: dict[tuple[int, str], dict[str, str]] = {}
    for (number, layer, side), key in contents.loras.items():
        layers.setdefault((number, layer), {})[side] = key
    found: dict[str, tuple[str, str]] = {}
    for (number, layer), keys in layers.items():
        if len(keys) < 2:
            raise invalid(
                f"The IP-Adapter's LoRA has down without up, or the reverse: {listed([*keys.values()])}."
            )
        if number >= len(modules):
            raise invalid(
                f"The IP-Adapter was made for another model: this one has no place for {keys['up']}."
            )
        path = f"{modules[number]}.{layer}" + (".0" if layer == "to_out" else "")
        _check_lora(keys["down"], keys["up"], shapes, tuple(unet.get_submodule(path).weight.shape))
        found[f"unet.{path}"] = keys["down"], keys["up"]
    return found


def _check_lora(down: str, up: str, shapes: Shapes, weight: tuple[int, ...]) -> None:
    rank = next(iter(shapes[down]), 0)
    if rank > MAX_RANK:
        raise invalid(f"{down} has rank {rank}; at most {MAX_RANK} is accepted.")
    _check_shape(down, shapes[down], (rank, weight[1]))
    _check_shape(up, shapes[up], (weight[0], rank))


def _lora(keys: Mapping[str, tuple[str, str]], tensors: Tensors) -> Lora | None:
    if not keys:
        return None
    used = {key: tensors[key] for pair in keys.values() for key in pair}
    check_finite(used)
    narrow = {key: each.float() if each.dtype == torch.float64 else each for key, each in used.items()}
    return Lora({name: LoraLayer(narrow[down], narrow[up]) for name, (down, up) in keys.items()})
