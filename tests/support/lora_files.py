"""LoRA files in every spelling that trainers write, all from one LoRA.

The names stand here a second time on purpose: they are what the files of others look like.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines.adapters.lora import LoraLayer

RANK, ALPHA = 4, 3.0

Shapes = Mapping[str, tuple[int, ...]]
Layers = Mapping[str, LoraLayer]
Named = tuple[str, tuple[str, ...]]  # a layer's name in the file, and the modules whose rows it stacks

_IMAGE_QKV = ("to_q", "to_k", "to_v")
_TEXT_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def draw(
    shapes: Shapes,
    rank: int = RANK,
    dtype: torch.dtype = torch.float32,
    *,
    biased: bool = False,
    seed: int = 11,
) -> dict[str, LoraLayer]:
    """A random LoRA on every layer, alpha not yet applied; layers that some spelling fuses share `down`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    downs: dict[str, Tensor] = {}
    layers: dict[str, LoraLayer] = {}
    for target, (rows, *inner) in shapes.items():
        group = fused_into(target)
        if group not in downs:
            downs[group] = torch.randn(rank, *inner, generator=generator).to(dtype)
        up = torch.randn(rows, rank, generator=generator).to(dtype) / 8
        bias = torch.randn(rows, generator=generator).to(dtype) / 8 if biased else None
        layers[target] = LoraLayer(downs[group], up, bias)
    return layers


def draw_norms(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Random weights around 1."""
    generator = torch.Generator("cpu").manual_seed(12)
    return {name: 1 + torch.randn(size, generator=generator) / 4 for name, size in sizes.items()}


def fused_into(target: str) -> str:
    """The block for layers that FLUX's original code fuses with others, one word for each fused group."""
    block, _, last = target.rpartition(".")
    if not target.startswith("transformer."):
        return target
    if last in _IMAGE_QKV or last == "proj_mlp":
        return block.removesuffix(".attn") + " image"
    return block + " text" if last in _TEXT_QKV else target


def folded(layers: Layers, rank: int = RANK) -> dict[str, LoraLayer]:
    """The same LoRA with alpha applied, as it should load."""
    return {target: scaled(layer, ALPHA / rank) for target, layer in layers.items()}


def scaled(layer: LoraLayer, scale: float) -> LoraLayer:
    bias = None if layer.bias is None else layer.bias.float() * scale
    return LoraLayer(layer.down, layer.up.float() * scale, bias)


def original_names(layers: Collection[str]) -> Iterator[Named]:
    """The transformer's layers as Black Forest Labs' code names them."""
    embedders = {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}
    for theirs, ours in embedders.items():
        for number, end in ((1, "in"), (2, "out")):
            yield f"{theirs}.{end}_layer", (f"transformer.time_text_embed.{ours}_embedder.linear_{number}",)
    yield "img_in", ("transformer.x_embedder",)
    yield "txt_in", ("transformer.context_embedder",)
    yield "final_layer.linear", ("transformer.proj_out",)
    yield "final_layer.adaLN_modulation.1", ("transformer.norm_out.linear",)
    for number in range(_blocks(layers, "transformer_blocks")):
        ours, theirs = f"transformer.transformer_blocks.{number}", f"double_blocks.{number}"
        yield f"{theirs}.img_attn.qkv", tuple(f"{ours}.attn.{part}" for part in _IMAGE_QKV)
        yield f"{theirs}.txt_attn.qkv", tuple(f"{ours}.attn.{part}" for part in _TEXT_QKV)
        yield f"{theirs}.img_attn.proj", (f"{ours}.attn.to_out.0",)
        yield f"{theirs}.txt_attn.proj", (f"{ours}.attn.to_add_out",)
        yield f"{theirs}.img_mod.lin", (f"{ours}.norm1.linear",)
        yield f"{theirs}.txt_mod.lin", (f"{ours}.norm1_context.linear",)
        for side, ff in (("img", "ff"), ("txt", "ff_context")):
            yield f"{theirs}.{side}_mlp.0", (f"{ours}.{ff}.net.0.proj",)
            yield f"{theirs}.{side}_mlp.2", (f"{ours}.{ff}.net.2",)
    for number in range(_blocks(layers, "single_transformer_blocks")):
        ours, theirs = f"transformer.single_transformer_blocks.{number}", f"single_blocks.{number}"
        qkv = tuple(f"{ours}.attn.{part}" for part in _IMAGE_QKV)
        yield f"{theirs}.linear1", (*qkv, f"{ours}.proj_mlp")
        yield f"{theirs}.linear2", (f"{ours}.proj_out",)
        yield f"{theirs}.modulation.lin", (f"{ours}.norm.linear",)


def xlabs_names(layers: Collection[str]) -> Iterator[Named]:
    """XLabs' trainer knows the attention only, as processors of the original code's blocks."""
    for number in range(_blocks(layers, "transformer_blocks")):
        attention = f"transformer.transformer_blocks.{number}.attn"
        theirs = f"double_blocks.{number}.processor"
        yield f"{theirs}.qkv_lora1", tuple(f"{attention}.{part}" for part in _IMAGE_QKV)
        yield f"{theirs}.qkv_lora2", tuple(f"{attention}.{part}" for part in _TEXT_QKV)
        yield f"{theirs}.proj_lora1", (f"{attention}.to_out.0",)
        yield f"{theirs}.proj_lora2", (f"{attention}.to_add_out",)
    for number in range(_blocks(layers, "single_transformer_blocks")):
        ours = f"transformer.single_transformer_blocks.{number}"
        theirs = f"single_blocks.{number}.processor"
        yield f"{theirs}.qkv_lora", tuple(f"{ours}.attn.{part}" for part in _IMAGE_QKV)
        yield f"{theirs}.proj_lora", (f"{ours}.proj_out",)


def original_norm_names(norms: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Norms as Black Forest Labs' code names them, and as diffusers does."""
    sides = {
        "norm_q": "img_attn",
        "norm_k": "img_attn",
        "norm_added_q": "txt_attn",
        "norm_added_k": "txt_attn",
    }
    for norm in norms:
        _, kind, number, _, last = norm.split(".")
        theirs = "query_norm" if last.endswith("q") else "key_norm"
        if kind == "transformer_blocks":
            yield f"double_blocks.{number}.{sides[last]}.norm.{theirs}", norm
        else:
            yield f"single_blocks.{number}.norm.{theirs}", norm


def own_names(component: str) -> Callable[[Collection[str]], Iterator[Named]]:
    """One component's layers as diffusers and transformers name them."""

    def names(layers: Collection[str]) -> Iterator[Named]:
        for target in layers:
            if target.startswith(f"{component}."):
                yield target.removeprefix(f"{component}."), (target,)

    return names


def _blocks(layers: Collection[str], kind: str) -> int:
    return len({target.split(".")[2] for target in layers if target.startswith(f"transformer.{kind}.")})


_transformer, _clip, _t5 = own_names("transformer"), own_names("text_encoder"), own_names("text_encoder_2")
Source = tuple[str, Callable[[Collection[str]], Iterator[Named]]]  # a prefix, and the names behind it


@dataclass(frozen=True, slots=True)
class Spelling:
    """How one kind of file is written."""

    sources: tuple[Source, ...]
    suffixes: tuple[str, str]
    flat: bool = False  # underscores for dots
    alpha: str = ""  # where alpha stands: "keys", "notes", or nowhere because `up` includes it
    block_diagonal: bool = False  # fused layers keep their parts' ranks apart
    convolutions: bool = False  # matrices as 1×1 kernels
    matrices: bool = False  # and the reverse


_PEFT = (".lora_A.weight", ".lora_B.weight")
_KOHYA = (".lora_down.weight", ".lora_up.weight")

SPELLINGS = {
    "diffusers": Spelling(
        (("transformer.", _transformer), ("text_encoder.text_model.", _clip), ("text_encoder_2.", _t5)), _PEFT
    ),
    "diffusers, text encoder without text_model": Spelling((("text_encoder.", _clip),), _PEFT),
    "diffusers, without transformer": Spelling((("", _transformer),), _PEFT),
    "diffusers, alpha in the notes": Spelling((("transformer.", _transformer),), _PEFT, alpha="notes"),
    "diffusers, alpha in keys": Spelling((("transformer.", _transformer),), _PEFT, alpha="keys"),
    "diffusers, kohya's suffixes": Spelling((("transformer.", _transformer),), _KOHYA, alpha="keys"),
    "peft": Spelling(
        (("base_model.model.", _transformer),), (".lora_A.default.weight", ".lora_B.default.weight")
    ),
    "peft, original names": Spelling((("base_model.model.", original_names),), _PEFT),
    "kohya": Spelling(
        (("lora_unet.", original_names), ("lora_te1.text_model.", _clip), ("lora_te3.", _t5)),
        _KOHYA,
        flat=True,
        alpha="keys",
    ),
    "kohya, block-diagonal": Spelling(
        (("lora_unet.", original_names),), _KOHYA, flat=True, alpha="keys", block_diagonal=True
    ),
    "kohya, diffusers' names": Spelling(
        (("lora_transformer.", _transformer), ("lora_te1.", _clip), ("lora_te2.", _t5)),
        _KOHYA,
        flat=True,
        alpha="keys",
    ),
    "kohya, as convolutions": Spelling(
        (("lora_unet.", original_names),), _KOHYA, flat=True, alpha="keys", convolutions=True
    ),
    "kohya, without alpha": Spelling((("lora_unet.", original_names),), _KOHYA, flat=True),
    "ComfyUI": Spelling((("diffusion_model.", original_names),), _PEFT),
    "ComfyUI, kohya's suffixes": Spelling(
        (("diffusion_model.", original_names), ("text_encoders.clip_l.transformer.text_model.", _clip)),
        _KOHYA,
        alpha="keys",
    ),
    "original": Spelling((("", original_names),), _PEFT),
    "XLabs": Spelling((("", xlabs_names),), (".down.weight", ".up.weight")),
}


def named(spelling: Spelling, layers: Layers) -> dict[str, tuple[str, ...]]:
    """The file's layers: name → the modules whose rows are stacked in it, those that the LoRA has."""
    found = {
        prefix + name: parts
        for prefix, names in spelling.sources
        for name, parts in names(layers)
        if layers.keys() >= set(parts)
    }
    if spelling.flat:
        found = {name.replace(".", "_"): parts for name, parts in found.items()}
    return found


def spell(spelling: Spelling, layers: Layers) -> dict[str, Tensor]:
    """The file's tensors."""
    tensors: dict[str, Tensor] = {}
    down_suffix, up_suffix = spelling.suffixes
    for name, parts in named(spelling, layers).items():
        each = [layers[part] for part in parts]
        if not spelling.alpha:
            each = [scaled(layer, ALPHA / layer.rank) for layer in each]
        down, ups = each[0].down, [layer.up for layer in each]
        if spelling.block_diagonal:
            down, up = torch.cat([down] * len(parts)), torch.block_diag(*ups)  # type: ignore[no-untyped-call]
        else:
            up = torch.cat(ups)
        biases = [layer.bias for layer in each if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        if name.replace(".", "_").endswith("final_layer_adaLN_modulation_1"):
            up, bias = _swapped(up), None if bias is None else _swapped(bias)
        if bias is not None:
            tensors[name + up_suffix.replace("weight", "bias")] = bias
        down, up = _stored(spelling, down, up)
        if spelling.alpha == "keys":
            grown = len(parts) if spelling.block_diagonal else 1
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA * grown)
        tensors |= {name + down_suffix: down.clone(), name + up_suffix: up.clone()}
    return tensors


def _stored(spelling: Spelling, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's matrices, or its kernels: a convolution's `up` is a kernel like its `down`."""
    if spelling.matrices and down.shape[2:] == (1, 1):
        return down.flatten(1), up
    if spelling.convolutions and down.dim() == 2:
        down = down[..., None, None]
    return (down, up[..., None, None]) if down.dim() == 4 else (down, up)


def _swapped(rows: Tensor) -> Tensor:
    scale, shift = rows.chunk(2)
    return torch.cat([shift, scale])


def spell_norms(spelling: Spelling, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of norms beside the transformer's layers in such a file."""
    (prefix, names), *_ = spelling.sources
    if names is original_names:
        return {f"{prefix}{name}.scale": norms[norm] for name, norm in original_norm_names(norms)}
    return {f"{prefix}{norm.removeprefix('transformer.')}.weight": weight for norm, weight in norms.items()}


def write(
    path: Path, spelling: Spelling, layers: Layers, norms: Mapping[str, Tensor] = MappingProxyType({})
) -> Path:
    """The file; as many layers of the LoRA as the spelling has names for."""
    notes = {"format": "pt"}
    if spelling.alpha == "notes":
        prefix, _ = spelling.sources[0]  # as diffusers: the component's name
        modules = [target.removeprefix(prefix) for target in layers if target.startswith(prefix)]
        biased = any(layer.bias is not None for layer in layers.values())
        settings = {
            "r": RANK,
            "lora_alpha": ALPHA,
            "use_rslora": False,
            "lora_bias": biased,
            "target_modules": modules,
        }
        named_settings = {f"{prefix}{key}": value for key, value in settings.items()}
        notes["lora_adapter_metadata"] = json.dumps(named_settings)
    save_file(spell(spelling, layers) | spell_norms(spelling, norms), path, notes)
    return path
