"""EasyControl for FLUX (Zhang et al. 2025, arXiv 2503.07027): pictures as conditions.

A condition's tokens run through the transformer as a third stream beside text and image, at time 0 and
with a LoRA that acts on them alone. Image and text attend to every condition, a condition only to itself;
so its keys and values depend neither on the image nor on the time, and are computed once a request.
Constants are those of the authors' code, https://github.com/Xiaojiu-z/EasyControl.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from PIL.Image import Image as Picture
from torch import Tensor
from torch.nn.functional import linear, pad

from pipelines.adapters import tensor_file
from pipelines.adapters.lora import MAX_RANK, LoraLayer
from pipelines.adapters.tensor_file import TensorFile, check_finite, invalid, listed
from pipelines.flux.attention import KeyValues, Pair
from pipelines.flux.sampling import PIXELS_PER_TOKEN, Grid, image_ids
from pipelines.images import to_tensor

Kind = Literal["spatial", "subject"]
"""Spatial conditions lie under the target, pixel for pixel; subjects show something to appear in it."""

SIZE_PX = 512
_SUBJECT_OFFSET = 64  # rows between the target's corner and the subject's


@dataclass(frozen=True, slots=True, eq=False)
class BlockLora:
    """What a block adds for a condition's tokens.

    To the projections of its input, and in double blocks to the attention's output: proj reads and
    changes what to_out gives.
    """

    q: LoraLayer
    k: LoraLayer
    v: LoraLayer
    proj: LoraLayer | None

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in (self.q, self.k, self.v, self.proj) if layer)


@dataclass(frozen=True, slots=True, eq=False)
class EasyControl:
    """The condition LoRA, double blocks first, then single ones; on the CPU in the file's dtype."""

    blocks: tuple[BlockLora, ...]

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """A picture under an EasyControl."""

    tokens: Tensor  # [n, 64], packed latents
    ids: Tensor  # [n, 3], of `position_ids`
    control: EasyControl
    scale: float  # of the LoRA; at 0 the plain picture is still attended to


def fit(picture: Picture, kind: Kind, size_px: int = SIZE_PX) -> Tensor:
    """An RGB picture → the condition's pixels [3, size_px, size_px] in [-1, 1], float32.

    A spatial condition is stretched to the square. A subject keeps its proportions, to whole tokens,
    in the middle of a grey square.
    """
    assert size_px % PIXELS_PER_TOKEN == 0, f"{size_px} pixels are no whole tokens"
    if kind == "spatial":
        return to_tensor(picture.resize((size_px, size_px), Image.Resampling.LANCZOS))
    longer = max(picture.size)
    inside = Grid.of(picture.width * size_px // longer, picture.height * size_px // longer)
    pixels = to_tensor(picture.resize((inside.width, inside.height), Image.Resampling.LANCZOS))
    left, top = (size_px - inside.width) // 2, (size_px - inside.height) // 2
    return pad(pixels, (left, size_px - inside.width - left, top, size_px - inside.height - top))


def position_ids(kind: Kind, condition: Grid, target: Grid) -> Tensor:
    """A condition's position ids [tokens, 3], float32: spread over the target, or beside it."""
    ids = image_ids(condition)
    if kind == "subject":
        return ids + torch.tensor([0, _SUBJECT_OFFSET, 0])
    return ids * torch.tensor([0, target.rows / condition.rows, target.columns / condition.columns])


def load(path: Path, transformer: Any) -> EasyControl:
    """Read an EasyControl for this transformer.

    All or nothing: every key must belong to a layer and fit it, and no layer may be missing. Raises
    AssetError ("invalid_weights") naming the keys at fault.
    """
    file = tensor_file.read(path)
    shapes = _shapes(transformer)
    keys = _keys(file, shapes)
    for layer, shape in shapes.items():
        _check_shapes(file, keys[f"{layer}.down.weight"], keys[f"{layer}.up.weight"], shape)
    tensors = file.load()
    check_finite(tensors)
    layers = {
        layer: LoraLayer(tensors[keys[f"{layer}.down.weight"]], tensors[keys[f"{layer}.up.weight"]])
        for layer in shapes
    }
    return EasyControl(tuple(_block(processor, layers) for processor in transformer.attn_processors))


def _shapes(transformer: Any) -> dict[str, tuple[int, int]]:
    """Every layer by its name in files, with the (out, in) of its up · down.

    Files name layers after the processors that diffusers lists, which are in the order of KeyValues.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for processor in transformer.attn_processors:
        attn = transformer.get_submodule(processor.removesuffix(".processor"))
        for letter in "qkv":
            projection = getattr(attn, f"to_{letter}")
            shapes[f"{processor}.{letter}_loras.0"] = (projection.out_features, projection.in_features)
        if not attn.pre_only:
            width = attn.to_out[0].out_features
            shapes[f"{processor}.proj_loras.0"] = (width, width)
    return shapes


_PREFIXES = ("", "transformer.", "diffusion_model.")
_ORDINARY_LORA = re.compile(r"\.(lora_(A|B|down|up)(\.\w+)?|(qkv|proj)_lora[12]?\.(down|up))\.weight$")


def _keys(file: TensorFile, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The file's keys by their names without prefix: all there, none twice, none left over."""
    names = [f"{layer}.{role}.weight" for layer in shapes for role in ("down", "up")]
    spellings = {prefix + name: name for name in names for prefix in _PREFIXES}
    keys: dict[str, str] = {}
    for key in file.shapes.keys() & spellings.keys():
        other = keys.setdefault(spellings[key], key)
        if other != key:
            raise invalid(f"The EasyControl has {spellings[key]} twice: {other} and {key}.")
    _refuse_unknown([key for key in file.shapes if key not in spellings], some_known=bool(keys))
    missing = [name for name in names if name not in keys]
    if missing:
        raise invalid(f"The EasyControl is not complete for this model; it lacks {listed(missing)}.")
    return keys


def _refuse_unknown(unknown: list[str], some_known: bool) -> None:
    if unknown and some_known:
        raise invalid(
            f"The EasyControl fits this model only partly; the model has no place for {listed(unknown)}."
        )
    if any(_ORDINARY_LORA.search(key) for key in unknown):
        raise invalid(
            f"The file is an ordinary LoRA, not an EasyControl; name it among the LoRAs: {listed(unknown)}."
        )
    if unknown:
        raise invalid(
            f"The file is not an EasyControl for this model, which has none of its keys: {listed(unknown)}."
        )


def _check_shapes(file: TensorFile, down: str, up: str, shape: tuple[int, int]) -> None:
    rank = file.shapes[down][0] if file.shapes[down] else 0
    if rank > MAX_RANK:
        raise invalid(f"{down} has rank {rank}; at most {MAX_RANK} is accepted.")
    rows, columns = shape
    for key, expected in ((down, (rank, columns)), (up, (rows, rank))):
        if file.shapes[key] != expected:
            raise invalid(
                f"The EasyControl was trained on another model: {key} has the shape "
                f"{list(file.shapes[key])} where {list(expected)} is expected."
            )


def _block(processor: str, layers: Mapping[str, LoraLayer]) -> BlockLora:
    q, k, v = (layers[f"{processor}.{letter}_loras.0"] for letter in "qkv")
    return BlockLora(q, k, v, layers.get(f"{processor}.proj_loras.0"))


@torch.inference_mode()
def keys_values(transformer: Any, condition: Condition, guidance: float, pooled: Tensor) -> KeyValues:
    """What image and text of a request attend to, under its guidance and pooled prompt [width of CLIP].

    Runs the condition alone through the transformer's own layers, LoRA hooks on them included; the
    attention processors are not used.
    """
    x = transformer.x_embedder(condition.tokens[None].to(transformer.device, transformer.dtype))
    stream = _Stream(
        time=_time_zero(transformer, guidance, pooled),
        rotary=transformer.pos_embed(condition.ids.to(transformer.device)),
        scale=condition.scale,
    )
    loras = iter(condition.control.blocks)
    bank: list[Pair] = []
    for block in transformer.transformer_blocks:
        x, pair = stream.double_block(block, next(loras), x)
        bank.append(pair)
    for block in transformer.single_transformer_blocks:
        x, pair = stream.single_block(block, next(loras), x)
        bank.append(pair)
    return KeyValues(tuple(bank))


def _time_zero(transformer: Any, guidance: float, pooled: Tensor) -> Tensor:
    """The modulation [1, width] at time 0, as FluxTransformer2DModel.forward makes it."""
    pooled = pooled[None].to(transformer.device, transformer.dtype)
    numbers = [pooled.new_zeros(1)]
    if transformer.config.guidance_embeds:
        numbers.append(pooled.new_full([1], guidance) * 1000)
    time: Tensor = transformer.time_text_embed(*numbers, pooled)
    return time


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    """A condition's way: FluxTransformerBlock and FluxSingleTransformerBlock without text, LoRA added.

    The methods take and give tokens [1, n, width], and give the block's keys and values as well.
    """

    time: Tensor  # [1, width]
    rotary: Pair
    scale: float

    def double_block(self, block: Any, lora: BlockLora, x: Tensor) -> tuple[Tensor, Pair]:
        assert lora.proj is not None, "a double block's LoRA has proj"
        normed, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, emb=self.time)
        attended, pair = self._attend(block.attn, lora, normed)
        to_out, dropout = block.attn.to_out
        attended = to_out(attended)
        x = x + gate[:, None] * dropout(attended + self._added(lora.proj, attended))
        normed = block.norm2(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return x + gate_mlp[:, None] * block.ff(normed), pair

    def single_block(self, block: Any, lora: BlockLora, x: Tensor) -> tuple[Tensor, Pair]:
        normed, gate = block.norm(x, emb=self.time)
        attended, pair = self._attend(block.attn, lora, normed)
        inner = block.act_mlp(block.proj_mlp(normed))
        x = x + gate[:, None] * block.proj_out(torch.cat([attended, inner], dim=2))
        return x.clip(-65504, 65504) if x.dtype == torch.float16 else x, pair

    def _attend(self, attn: Any, lora: BlockLora, x: Tensor) -> tuple[Tensor, Pair]:
        """The condition to itself."""
        query, key, value = (
            (project(x) + self._added(layer, x)).unflatten(-1, (-1, attn.head_dim))
            for project, layer in ((attn.to_q, lora.q), (attn.to_k, lora.k), (attn.to_v, lora.v))
        )
        query, key = (
            apply_rotary_emb(norm(each), self.rotary, sequence_dim=1)
            for norm, each in ((attn.norm_q, query), (attn.norm_k, key))
        )
        attended = dispatch_attention_fn(query, key, value, backend=attn.processor._attention_backend)
        return attended.flatten(2).to(x.dtype), (key[0], value[0])

    def _added(self, layer: LoraLayer, x: Tensor) -> Tensor:
        return self.scale * linear(linear(x, layer.down.to(x)), layer.up.to(x))
