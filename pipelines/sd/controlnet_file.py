"""ControlNets for SD, from files that come from outside.

A ControlNet repeats the encoder of a UNet with a convolution after each part. The names and shapes of the
tensors tell which parts attend, the UNet all widths; a config.json beside them is compared with both, and
tells what neither does.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from pipelines.adapters import tensor_file
from pipelines.adapters.tensor_file import TensorFile, check_finite, invalid, listed
from pipelines.sd.controlnet_names import names
from schemas.errors import AssetError

INVALID_CONFIG = "invalid_config"

MAX_BLOCKS = 8  # SD has 4, SDXL 3
MAX_LAYERS = 16  # of a transformer; SDXL's have up to 10
_PIXEL_CHANNELS = 3

Shapes = Mapping[str, tuple[int, ...]]

_CROSS: Final = "CrossAttnDownBlock2D"
_PLAIN: Final = "DownBlock2D"
_MID_CROSS: Final = "UNetMidBlock2DCrossAttn"
_MID_PLAIN: Final = "UNetMidBlock2D"

_Size = Annotated[int, Field(ge=1, le=1 << 20)]
_Sizes = Annotated[tuple[_Size, ...], Field(strict=False, min_length=1, max_length=MAX_BLOCKS)]
_Layers = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
_Number = Annotated[float, Field(gt=0, le=1 << 20)]


class ControlNetConfig(BaseModel):
    """The arguments of diffusers' ControlNetModel, with its defaults, for nets of SD's kind.

    `attention_head_dim` is the number of heads, here as in every config of diffusers' UNets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    in_channels: _Size = 4
    conditioning_channels: _Size = 3
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, Field(ge=0, le=1)] = 0
    down_block_types: Annotated[
        tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...],
        Field(strict=False, min_length=1, max_length=MAX_BLOCKS),
    ] = (_CROSS, _CROSS, _CROSS, _PLAIN)
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] = _MID_CROSS
    only_cross_attention: Literal[False] = False
    block_out_channels: _Sizes = (320, 640, 1280, 1280)
    layers_per_block: _Size = 2
    downsample_padding: Literal[1] = 1
    mid_block_scale_factor: _Number = 1
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    norm_num_groups: _Size = 32
    norm_eps: _Number = 1e-5
    cross_attention_dim: _Size = 1280
    transformer_layers_per_block: _Layers | Annotated[tuple[_Layers, ...], Field(strict=False)] = 1
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: _Size | _Sizes = 8
    num_attention_heads: _Size | _Sizes | None = None
    use_linear_projection: bool = False
    class_embed_type: None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: _Size | None = None
    num_class_embeds: None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: Literal["default"] = "default"
    projection_class_embeddings_input_dim: _Size | None = None
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    conditioning_embedding_out_channels: _Sizes = (16, 32, 96, 256)
    global_pool_conditions: bool = False
    addition_embed_type_num_heads: _Size = 64

    @model_validator(mode="before")
    @classmethod
    def _without_notes(cls, data: Any) -> Any:
        """Leave out what diffusers notes beside the arguments, and what is no argument any more."""
        if not isinstance(data, dict):
            return data
        if data.get("_class_name", "ControlNetModel") != "ControlNetModel":
            raise ValueError("_class_name is not ControlNetModel")
        return {key: value for key, value in data.items() if key[:1] != "_" and key not in _NO_ARGUMENTS}

    @model_validator(mode="after")
    def _fits_together(self) -> "ControlNetConfig":
        """What diffusers needs to build the net."""
        widths = self.block_out_channels
        for name in ("down_block_types", *_BY_BLOCK):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(widths):
                raise ValueError(f"{name} has {len(value)} values for the {len(widths)} block_out_channels")
        heads = _by_block(self, self.num_attention_heads or self.attention_head_dim)
        for width, count in zip(widths, heads, strict=True):
            if width % count or width % self.norm_num_groups:
                raise ValueError(
                    f"{width} of the block_out_channels do not divide into {count} heads "
                    f"and {self.norm_num_groups} groups"
                )
        return self


_BY_BLOCK = ("transformer_layers_per_block", "attention_head_dim", "num_attention_heads")

# Of a UNet, or of diffusers before 0.14, and ignored by ControlNetModel.
_NO_ARGUMENTS = {
    "center_input_sample",
    "controlnet_conditioning_channels",
    "controlnet_conditioning_embedding_type",
    "conv_in_kernel",
    "dropout",
    "dual_cross_attention",
    "out_channels",
    "sample_size",
    "time_cond_proj_dim",
    "time_embedding_type",
    "timestep_post_act",
}


def _by_block(config: ControlNetConfig, value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * len(config.block_out_channels)


def read_config(data: bytes) -> ControlNetConfig:
    """A config.json. Raises AssetError ("invalid_config") naming the field."""
    try:
        return ControlNetConfig.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        fault = first["msg"].removeprefix("Value error, ")
        field = "".join(map(str, first["loc"][:1]))[:100]
        sentence = f"{field}: {fault}" if field else fault
        raise AssetError(f"The ControlNet's config is not usable. {sentence}.", INVALID_CONFIG) from None


def load(path: Path, unet: UNet2DConditionModel, config: ControlNetConfig | None = None) -> ControlNetModel:
    """The ControlNet of a file, on the UNet's device and in its dtype, ready to be called.

    All or nothing: each tensor must have a place and fit it, and none may be missing. Raises AssetError
    ("invalid_weights" that names the keys, "invalid_config" where the config says otherwise).
    """
    file = tensor_file.read(path)
    found = architecture(file.shapes, unet)
    net = _empty(found)
    places = names(file.shapes)
    _check_fits(file.shapes, places, net)
    if config is not None:
        net = _empty(_agreed(found, config))
    net.load_state_dict(_tensors(file, places, unet), assign=True)
    return net.eval().requires_grad_(False)


def architecture(shapes: Shapes, unet: UNet2DConditionModel) -> ControlNetConfig:
    """What kind of ControlNet a file with these tensors holds, if it was made for this UNet.

    The file tells which blocks attend, through how many layers, and how the control image is read; all else
    is the UNet's. `load` compares the shapes. Raises AssetError for a file that is no ControlNet.
    """
    named = {name: shapes[key] for key, name in names(shapes).items()}
    _check_kind(shapes, named)
    _check_base(named, unet)
    base = unet.config
    blocks = [f"down_blocks.{number}" for number in range(len(base.block_out_channels))]
    depths = _transformers(named)
    pooled = _reads_pooled_text(named)
    return ControlNetConfig(
        in_channels=base.out_channels,  # the latents': UNets for IC-Light and inpainting take more in
        flip_sin_to_cos=base.flip_sin_to_cos,
        freq_shift=base.freq_shift,
        down_block_types=tuple(_CROSS if block in depths else _PLAIN for block in blocks),
        mid_block_type=_MID_CROSS if "mid_block" in depths else _MID_PLAIN,
        block_out_channels=tuple(base.block_out_channels),
        layers_per_block=base.layers_per_block,
        mid_block_scale_factor=base.mid_block_scale_factor,
        act_fn=base.act_fn,
        norm_num_groups=base.norm_num_groups,
        norm_eps=base.norm_eps,
        cross_attention_dim=base.cross_attention_dim,
        transformer_layers_per_block=(
            *(depths.get(block, 1) for block in blocks[:-1]),
            depths.get("mid_block", depths.get(blocks[-1], 1)),
        ),
        attention_head_dim=_heads(base),
        use_linear_projection=any(
            name.endswith(".proj_in.weight") and len(shape) == 2 for name, shape in named.items()
        ),
        upcast_attention=base.upcast_attention,
        addition_embed_type="text_time" if pooled else None,
        addition_time_embed_dim=base.addition_time_embed_dim if pooled else None,
        projection_class_embeddings_input_dim=base.projection_class_embeddings_input_dim if pooled else None,
        conditioning_embedding_out_channels=_hint_channels(named),
    )


def _heads(base: Any) -> int | tuple[int, ...]:
    """How many heads attend, in each block; diffusers calls the number attention_head_dim."""
    heads = base.num_attention_heads or base.attention_head_dim
    return heads if isinstance(heads, int) else tuple(heads)


# What others call their files' tensors, and what is wrong with those files here.
_OTHER_KINDS = {
    r"(^|\.)difference$": "is the difference between a ControlNet and its base; only whole nets are accepted",
    r"(^|\.)(task_embedding$|control_add_embedding\.)": (
        "is a ControlNet-Union; only nets for one kind of control image are accepted"
    ),
    r"^lora_controlnet$": "is a Control-LoRA; only whole ControlNets are accepted",
    r"^lllite_": "is a ControlNet-LLLite; only whole ControlNets are accepted",
    r"^lora_|\.lora_": "is a LoRA, not a ControlNet",
    r"^(adapter\.)?body\.\d": "is a T2I-Adapter, not a ControlNet",
    r"^(controlnet_x_embedder|pos_embed_input)\.": (
        "is a ControlNet for a transformer, such as FLUX, not for Stable Diffusion"
    ),
    r"(^|\.)(up_blocks|output_blocks)\.": "holds a whole UNet; only the ControlNet itself is accepted",
}
_HINT = "controlnet_cond_embedding.conv_in.weight"


def _check_kind(shapes: Shapes, named: Shapes) -> None:
    for pattern, fault in _OTHER_KINDS.items():
        if any(map(re.compile(pattern).search, shapes)):
            raise invalid(f"The file {fault}.")
    if _HINT not in named:
        raise invalid(
            f"The file is not a ControlNet for Stable Diffusion: it has no {_HINT}. "
            f"What it has is {listed(shapes)}."
        )


_BASES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # by the width of their text


def _check_base(named: Shapes, unet: UNet2DConditionModel) -> None:
    expected = unet.config.cross_attention_dim
    widths = (shape[-1] for name, shape in named.items() if name.endswith(".attn2.to_k.weight") and shape)
    width = next(widths, expected)
    if width != expected:
        raise invalid(
            f"The ControlNet was made for {_BASES.get(width, 'another model')}: it reads text {width} wide "
            f"where {expected} is expected."
        )
    if _reads_pooled_text(named) and unet.config.addition_embed_type is None:
        raise invalid("The ControlNet was made for SDXL: it reads pooled text, which this model has not.")
    if unet.config.addition_embed_type is not None and not _reads_pooled_text(named):
        raise invalid("The ControlNet was not made for SDXL: it has no add_embedding.linear_1.weight.")
    if named[_HINT][1:2] != (_PIXEL_CHANNELS,):
        raise invalid(
            f"The ControlNet does not read pictures of {_PIXEL_CHANNELS} channels: {_HINT} has the shape "
            f"{list(named[_HINT])}."
        )


def _reads_pooled_text(named: Shapes) -> bool:
    """Whether a net is told about the text as a whole and about sizes, as SDXL's are."""
    return any(name.startswith("add_embedding.") for name in named)


_ATTENTION = re.compile(
    r"(?P<part>down_blocks\.\d|mid_block)\.attentions\.\d\.(transformer_blocks\.(?P<layer>\d{1,6})\.)?"
)


def _transformers(named: Shapes) -> dict[str, int]:
    """The blocks that attend, with the number of layers in their transformers.

    There may be none: in SDXL's small and mid nets some attentions are projections only.
    """
    depths: dict[str, int] = {}
    for name in named:
        if match := _ATTENTION.match(name):
            depth = int(match["layer"]) + 1 if match["layer"] else 0
            depths[match["part"]] = max(depth, depths.get(match["part"], 0))
    deepest = max(depths.values(), default=0)
    if deepest > MAX_LAYERS:
        raise invalid(
            f"The ControlNet has a transformer of {deepest} layers; at most {MAX_LAYERS} are accepted."
        )
    return depths


def _hint_channels(named: Shapes) -> tuple[int, ...]:
    """The widths of the convolutions that shrink the control image by 8; 1 for those that are missing."""
    layers = [_HINT, *(f"controlnet_cond_embedding.blocks.{number}.weight" for number in (1, 3, 5))]
    return tuple(next(iter(named.get(layer, ())), 1) for layer in layers)


def _agreed(found: ControlNetConfig, given: ControlNetConfig) -> ControlNetConfig:
    """The given config, if it says what the file's tensors and the UNet say."""
    ours, theirs = _told(found), _told(given)
    for name, value in ours.items():
        if name in theirs and theirs[name] != value:
            raise AssetError(
                f"The ControlNet's config says that {name} is {theirs[name]}, its tensors and the model say "
                f"{value}.",
                INVALID_CONFIG,
            )
    return given


# What only a config tells. The rest shapes a tensor or has to be the UNet's.
_SILENT = {
    "flip_sin_to_cos",
    "freq_shift",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "attention_head_dim",
    "num_attention_heads",
    "upcast_attention",
    "controlnet_conditioning_channel_order",
    "global_pool_conditions",
    "addition_embed_type_num_heads",
}


def _told(config: ControlNetConfig) -> dict[str, Any]:
    """What a file and a UNet tell of a config, without what means nothing to that net."""
    silent = set(_SILENT)
    attending = [kind == _CROSS for kind in config.down_block_types]
    attending[-1] |= config.mid_block_type == _MID_CROSS  # which has the last block's number of layers
    depths = [
        depth if attends else None
        for depth, attends in zip(
            _by_block(config, config.transformer_layers_per_block), attending, strict=True
        )
    ]
    if not any(attending):
        silent.add("use_linear_projection")
    if not any(depths):
        silent.add("cross_attention_dim")
    if config.addition_embed_type is None:
        silent |= {"addition_time_embed_dim", "projection_class_embeddings_input_dim"}
    return {
        name: depths if name == "transformer_layers_per_block" else value
        for name, value in config.model_dump().items()
        if name not in silent
    }


def _empty(config: ControlNetConfig) -> ControlNetModel:
    """The net without values."""
    with torch.device("meta"):
        return ControlNetModel(**config.model_dump())


def _check_fits(shapes: Shapes, places: Mapping[str, str], net: ControlNetModel) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    counts = Counter(places.values())
    unknown = [key for key, name in places.items() if name not in expected]
    missing = [name for name in expected if not counts[name]]
    twice = [name for name, count in counts.items() if count > 1]
    if unknown:
        raise invalid(f"A ControlNet for this model has no place for {listed(unknown)}.")
    if missing:
        raise invalid(f"The ControlNet is not complete. It lacks {listed(missing)}.")
    if twice:
        raise invalid(f"The ControlNet has some tensors under two names: {listed(twice)}.")
    for key, name in places.items():
        if shapes[key] != expected[name]:
            raise invalid(
                f"The ControlNet was made for another model: {key} has the shape {list(shapes[key])} "
                f"where {list(expected[name])} is expected."
            )


def _tensors(file: TensorFile, places: Mapping[str, str], unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The net's tensors, as the UNet keeps its own."""
    tensors = file.load()
    device, dtype = unet.device, unet.dtype  # diffusers walks through all modules to find these
    for key in tensors:
        tensors[key] = tensors[key].to(device, dtype)
    check_finite(tensors)
    return {name: tensors[key] for key, name in places.items()}
