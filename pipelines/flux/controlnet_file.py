"""ControlNets for FLUX, from files that come from outside.

A ControlNet repeats the base's first blocks with a linear layer after each. Files name the tensors as
diffusers does (InstantX, Shakker-Labs) or as XLabs does, after Black Forest Labs' code
(https://github.com/XLabs-AI/x-flux, controlnet.py). The tensors' names and shapes tell the architecture;
a config.json beside them is only compared with it.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from pipelines.adapters import tensor_file
from pipelines.adapters.tensor_file import TensorFile, check_finite, invalid, listed
from pipelines.flux.lora_keys import targets, translator
from schemas.errors import AssetError

INVALID_CONFIG = "invalid_config"

MAX_BLOCKS = 64  # of each kind; FLUX itself has 19 and 38
_PIXELS_PATCH = 2  # the hint's convolutions shrink it by 8, patches by 2: the 16 pixels of a token

Shapes = Mapping[str, tuple[int, ...]]

_Size = Annotated[int, Field(ge=1, le=1 << 20)]
_Blocks = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
_Axis = Annotated[int, Field(ge=2, le=1 << 10, multiple_of=2)]


class ControlNetConfig(BaseModel):
    """The arguments of diffusers' FluxControlNetModel, with its defaults; no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    patch_size: _Size = 1  # of the hint's features, where the net reads pixels
    in_channels: _Size = 64
    num_layers: _Blocks = 19
    num_single_layers: _Blocks = 38
    attention_head_dim: _Size = 128
    num_attention_heads: _Size = 24
    joint_attention_dim: _Size = 4096
    pooled_projection_dim: _Size = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[_Axis, _Axis, _Axis] = Field((16, 56, 56), strict=False)
    num_mode: _Size | None = None  # of a union net
    conditioning_embedding_channels: _Size | None = None  # of a net that reads pixels

    @model_validator(mode="before")
    @classmethod
    def _without_notes(cls, data: Any) -> Any:
        """Leave out what diffusers notes beside the arguments.

        `out_channels` is the base's: FluxControlNetModel.from_transformer copies it along.
        """
        if not isinstance(data, dict):
            return data
        if data.get("_class_name", "FluxControlNetModel") != "FluxControlNetModel":
            raise ValueError("_class_name is not FluxControlNetModel")
        return {key: value for key, value in data.items() if key[:1] != "_" and key != "out_channels"}

    @model_validator(mode="after")
    def _positions_fill_a_head(self) -> "ControlNetConfig":
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {list(self.axes_dims_rope)} does not add up to attention_head_dim, "
                f"{self.attention_head_dim}"
            )
        return self


def read_config(data: bytes) -> ControlNetConfig:
    """A config.json. Raises AssetError ("invalid_config") naming the field."""
    try:
        return ControlNetConfig.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        fault = first["msg"].removeprefix("Value error, ")
        field = ".".join(map(str, first["loc"]))[:100]
        sentence = f"{field}: {fault}" if field else fault
        raise AssetError(f"The ControlNet's config is not usable. {sentence}.", INVALID_CONFIG) from None


def load(
    path: Path, base: FluxTransformer2DModel, config: ControlNetConfig | None = None
) -> FluxControlNetModel:
    """The ControlNet of a file, on the base's device and in its dtype, ready to be called.

    All or nothing: each tensor must have a place and fit it, and none may be missing. Raises AssetError
    ("invalid_weights" that names the keys, "invalid_config" where the config says otherwise).
    """
    file = tensor_file.read(path)
    found = architecture(file.shapes, base)
    net = _empty(found)
    places = _places(file.shapes, net)
    if config is not None:
        net = _empty(_agreed(found, config))
    net.load_state_dict(_tensors(file, places, net, base), assign=True)
    return net.eval().requires_grad_(False)


def architecture(shapes: Shapes, base: FluxTransformer2DModel) -> ControlNetConfig:
    """What kind of ControlNet a file with these tensors holds, if it was made for this base.

    Names tell what a net has and how many blocks; widths are the base's. `load` compares the shapes.
    Raises AssetError for a file that is no ControlNet.
    """
    if shapes.keys().isdisjoint(("controlnet_x_embedder.weight", "pos_embed_input.weight")):
        raise invalid(
            "The file is not a ControlNet for FLUX: it has no controlnet_x_embedder.weight. "
            f"What it has is {listed(shapes)}."
        )
    double = _count(shapes, "double", r"(transformer|double)_blocks")
    single = _count(shapes, "single", r"single_(transformer_)?blocks")
    if not double + single:
        raise invalid("The ControlNet has no blocks.")
    widths = base.config
    reads_pixels = any(key.startswith("input_hint_block.") for key in shapes)
    return ControlNetConfig(
        patch_size=_PIXELS_PATCH if reads_pixels else 1,
        in_channels=widths.in_channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=widths.attention_head_dim,
        num_attention_heads=widths.num_attention_heads,
        joint_attention_dim=widths.joint_attention_dim,
        pooled_projection_dim=widths.pooled_projection_dim,
        guidance_embeds=any(_GUIDANCE.match(key) for key in shapes),
        axes_dims_rope=tuple(widths.axes_dims_rope),
        num_mode=next(iter(shapes.get("controlnet_mode_embedder.weight", ())), None),
        conditioning_embedding_channels=widths.in_channels // _PIXELS_PATCH**2 if reads_pixels else None,
    )


_GUIDANCE = re.compile(r"(time_text_embed\.guidance_embedder|guidance_in)\.")


def _count(shapes: Shapes, kind: str, name: str) -> int:
    """How many blocks there are, by the highest number."""
    pattern = re.compile(name + r"\.(?P<number>\d{1,6})\.")
    numbers = [int(match["number"]) for key in shapes if (match := pattern.match(key))]
    count = max(numbers, default=-1) + 1
    if count > MAX_BLOCKS:
        raise invalid(f"The ControlNet has {count} {kind} blocks; at most {MAX_BLOCKS} are accepted.")
    return count


def _agreed(found: ControlNetConfig, given: ControlNetConfig) -> ControlNetConfig:
    """The given config, if it says what the file's tensors say."""
    silent = {"axes_dims_rope"}  # what tensors do not tell
    if found.conditioning_embedding_channels is None:
        silent.add("patch_size")
    for name in ControlNetConfig.model_fields.keys() - silent:
        ours, theirs = getattr(found, name), getattr(given, name)
        if ours != theirs:
            message = f"The ControlNet's config says that {name} is {theirs}, its tensors say {ours}."
            raise AssetError(message, INVALID_CONFIG)
    return given


def _empty(config: ControlNetConfig) -> FluxControlNetModel:
    """The net without values."""
    with torch.device("meta"), warnings.catch_warnings():
        # diffusers 0.42 warns of where it itself imports this class from
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        return FluxControlNetModel(**config.model_dump())


def _places(shapes: Shapes, net: FluxControlNetModel) -> dict[str, tuple[str, ...]]:
    """The file's keys, each with the tensors of the net whose rows it stacks."""
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    translate = _translator(net)
    places = {key: (key,) if key in expected else translate(key) for key in shapes}
    _check_complete(places, expected)
    for key, names in places.items():
        fitting = (sum(expected[name][0] for name in names), *expected[names[0]][1:])
        if shapes[key] != fitting:
            raise invalid(
                f"The ControlNet was made for another model: {key} has the shape {list(shapes[key])} "
                f"where {list(fitting)} is expected."
            )
    return places


def _check_complete(places: Mapping[str, tuple[str, ...]], expected: Shapes) -> None:
    counts = Counter(name for names in places.values() for name in names)
    unknown = [key for key, names in places.items() if not names or not expected.keys() >= set(names)]
    missing = [name for name in expected if not counts[name]]
    twice = [name for name, count in counts.items() if count > 1]
    if unknown:
        raise invalid(f"A ControlNet for FLUX has no place for {listed(unknown)}.")
    if missing:
        raise invalid(f"The ControlNet is not complete. It lacks {listed(missing)}.")
    if twice:
        raise invalid(f"The ControlNet has some tensors under two names: {listed(twice)}.")


# The original's names that are not those of linear layers.
_OUTSIDE = {
    "input_hint_block.0": "input_hint_block.conv_in",
    **{f"input_hint_block.{2 * number + 2}": f"input_hint_block.blocks.{number}" for number in range(6)},
    "input_hint_block.14": "input_hint_block.conv_out",
    "pos_embed_input": "controlnet_x_embedder",
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def _translator(net: FluxControlNetModel) -> Callable[[str], tuple[str, ...]]:
    """From the original's key to the net's tensors whose rows it stacks, none for a key of other kinds."""
    linear = translator(targets(net, nn.Identity(), nn.Identity()))  # layers are named as LoRAs name them
    norms = dict(_norms(net.config))

    def translate(key: str) -> tuple[str, ...]:
        layer, _, kind = key.rpartition(".")
        if key in norms:
            return (norms[key],)
        if layer in _OUTSIDE:
            return (f"{_OUTSIDE[layer]}.{kind}",)
        destination = linear(layer)
        paths = destination.targets if destination else ()
        return tuple(f"{path.removeprefix('transformer.')}.{kind}" for path in paths)

    return translate


def _norms(config: Any) -> Iterator[tuple[str, str]]:
    for theirs, ours, count, norms in (
        ("double_blocks", "transformer_blocks", config.num_layers, _DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", config.num_single_layers, _SINGLE_NORMS),
    ):
        for number in range(count):
            for name, norm in norms.items():
                yield f"{theirs}.{number}.{name}.scale", f"{ours}.{number}.{norm}.weight"


def _tensors(
    file: TensorFile,
    places: Mapping[str, tuple[str, ...]],
    net: FluxControlNetModel,
    base: FluxTransformer2DModel,
) -> dict[str, Tensor]:
    """The net's tensors, as the base keeps its own."""
    tensors = file.load()
    for key in tensors:
        tensors[key] = tensors[key].to(base.device, base.dtype)
    check_finite(tensors)
    rows = {name: len(tensor) for name, tensor in net.state_dict().items()}
    found: dict[str, Tensor] = {}
    for key, names in places.items():
        parts = tensors[key].split_with_sizes([rows[name] for name in names])
        found |= zip(names, parts, strict=True)
    return found
