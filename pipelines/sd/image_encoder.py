"""CLIP's image encoder, which tells IP-Adapters what a picture shows.

Its files may be a stranger's: only safetensors are read, and their tensors must fit the config one by one.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image as Picture
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from pipelines.adapters import tensor_file
from pipelines.adapters.tensor_file import TensorFile, invalid, listed
from pipelines.sd.checkpoints import LIMITS, Stored
from pipelines.sd.component import Component, check_sizes, made
from pipelines.sd.repository import choose, read_config, weights


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """What CLIP says of one picture, on the encoder's device in its dtype."""

    embedding: Tensor  # [projection width]
    hidden: Tensor  # [tokens, width]: the last but one of its hidden states


class ImageEncoder:
    """A CLIPVisionModelWithProjection. Its methods may be called from several threads."""

    def __init__(self, model: Any) -> None:
        side = model.config.image_size
        self._model = model
        self._shape = (model.config.num_channels, side, side)
        self._processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._model.parameters())

    def features(self, picture: Picture) -> ImageFeatures:
        """Of an RGB picture of any size; its middle square is looked at."""
        pixels = self._processor(_not_too_long(picture), return_tensors="pt").pixel_values[0]
        return self._encode(pixels)

    def of_noise(self, factor: float, generator: torch.Generator) -> ImageFeatures:
        """Of uniform noise in [0, factor] in the place of a normalised picture; `generator` draws it."""
        noise = torch.rand(self._shape, generator=generator, device=generator.device)
        return self._encode(noise * factor)

    def negative(self, factor: float, generator: torch.Generator) -> ImageFeatures:
        """What the unconditional row is shown in the place of a picture.

        At 0 as in diffusers: a zero embedding, and the hidden states of a picture of zeros; nothing is drawn
        then. Else both are those of noise.
        """
        if factor:
            return self.of_noise(factor, generator)
        nothing = self._encode(torch.zeros(self._shape))
        return ImageFeatures(torch.zeros_like(nothing.embedding), nothing.hidden)

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> ImageFeatures:
        """Normalised pixels, [channels, side, side]."""
        given = pixels[None].to(self._model.device, self._model.dtype)
        told = self._model(given, output_hidden_states=True)
        return ImageFeatures(told.image_embeds[0], told.hidden_states[-2][0])


_LONGEST = 16  # times the shorter side


def _not_too_long(picture: Picture) -> Picture:
    """Without the ends of a very long picture, which only the resizing would see, at any cost."""
    width, height = picture.size
    most = _LONGEST * min(picture.size)
    if max(picture.size) <= most:
        return picture
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return picture.crop((left, top, left + min(width, most), top + min(height, most)))


def load(
    source: Path, device: torch.device | str, dtype: torch.dtype, *, variant: str | None = None
) -> ImageEncoder:
    """An encoder from a folder with config.json and safetensors, or from a safetensors file.

    In a folder the files of `variant` are read, or else the plain ones. The config of a file is that
    beside it or, failing that, told by its tensors. A whole CLIP will do; its text encoder is left out.
    Raises AssetError ("invalid_weights").
    """
    files = [tensor_file.read(path, limits=LIMITS) for path in _paths(source, variant)]
    stored = Stored([(file, _names(file)) for file in files], lambda tensors: tensors)
    folder = source if source.is_dir() else source.parent
    has_config = source.is_dir() or (folder / "config.json").is_file()
    fields = _fields(read_config(folder / "config.json")) if has_config else _told(stored.shapes())
    check_sizes(_NAME, fields)
    _check_pictures(fields)
    config = made(_NAME, lambda: CLIPVisionConfig(**fields))
    component = Component(_NAME, made(_NAME, lambda: CLIPVisionModelWithProjection(config)), stored)
    component.check()
    return ImageEncoder(component.filled(device, dtype))


_NAME = "image encoder"


def _paths(source: Path, variant: str | None) -> list[Path]:
    """The files to read, which belong together."""
    if not source.is_dir():
        if not source.is_file():
            raise invalid(f"There is no image encoder at {source}.")
        return [source]
    others = sorted(path for path in source.iterdir() if path.suffix == ".safetensors" and path.is_file())
    if weights(source) or not others:
        return choose(source, variant)
    if len(others) > 1:
        names = listed([path.name for path in others])
        raise invalid(f"The image encoder's folder has several files: {names}. Name one of them.")
    return others


_PREFIXES = ("vision_model.", "visual_projection.")
_OF_TEXT = ("text_model.", "text_projection.", "logit_scale")  # a whole CLIP has these too


def _names(file: TensorFile) -> list[str]:
    """What of a file is the encoder's: all but the text encoder, and numbers of positions."""
    if not any(name.startswith(_PREFIXES) for name in file.shapes):
        raise invalid(
            f"The file is not CLIP's image encoder as transformers names it: it has {listed(file.shapes)}."
        )
    return [name for name in file.shapes if not name.startswith(_OF_TEXT) and "position_ids" not in name]


_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
_TYPES = ("clip_vision_model", "clip")


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes the encoder, of its config or of a whole CLIP's."""
    if config.get("model_type") not in _TYPES:
        raise invalid(f"The image encoder is a {str(config.get('model_type'))[:80]}, not CLIP's.")
    if config["model_type"] == "clip":
        inner = config.get("vision_config")
        if not isinstance(inner, dict):
            raise invalid("The image encoder's config.json has no vision_config.")
        config = {"projection_dim": config.get("projection_dim", 512)} | inner
    return {key: config[key] for key in _FIELDS if key in config}


def _check_pictures(fields: Mapping[str, Any]) -> None:
    for key, usual in (("image_size", 224), ("patch_size", 32), ("num_channels", 3)):
        value = fields.get(key, usual)
        if not isinstance(value, int) or value < 1:
            raise invalid(f"The config of the {_NAME} is not usable: {key} is {str(value)[:80]}.")
    if fields.get("num_channels", 3) != 3:
        raise invalid(f"The {_NAME} does not read RGB pictures.")
    if fields.get("image_size", 224) > _MAX_SIDE:
        raise invalid(f"The {_NAME} reads pictures of more than {_MAX_SIDE} pixels a side.")


_MAX_SIDE = 1024  # the largest CLIP's is 448

# What tensors do not say, by width: the heads, and the function between layers. B and L are OpenAI's
# (https://github.com/openai/CLIP), H and bigG LAION's (https://github.com/mlfoundations/open_clip).
_KNOWN = {
    768: (12, "quick_gelu"),
    1024: (16, "quick_gelu"),
    1280: (16, "gelu"),
    1664: (16, "gelu"),
}
_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d{1,4})\.")


def _told(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the tensors of an encoder of a known width tell of its config."""
    width, channels, patch, _ = _shape(shapes, "vision_model.embeddings.patch_embedding.weight", 4)
    positions, _ = _shape(shapes, "vision_model.embeddings.position_embedding.weight", 2)
    inner, _ = _shape(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)
    projection, _ = _shape(shapes, "visual_projection.weight", 2)
    if width not in _KNOWN:
        raise invalid(
            f"The image encoder is {width} wide, and no known one is. It needs its config.json beside it."
        )
    heads, activation = _KNOWN[width]
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "projection_dim": projection,
        "num_hidden_layers": len({match[1] for name in shapes if (match := _LAYER.match(name))}),
        "num_attention_heads": heads,
        "num_channels": channels,
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
        "hidden_act": activation,
    }


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, axes: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise invalid(f"The image encoder is not complete. It lacks {name}.")
    if len(shape) != axes:
        raise invalid(f"The image encoder is not CLIP's: {name} has the shape {list(shape)}.")
    return shape
