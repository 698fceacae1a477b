"""What a model's weights and computations take of a device, told from its files without loading them."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from pipelines.adapters import tensor_file
from pipelines.live import peak_bytes

LOADED = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2")  # of a base model's components
TOKEN_PX = 16  # a side of an image token
ROW_PX = 512  # a side of the rows of the largest forward: smaller ones carry more text, and are fewer
CELL_PX = 8  # of a VAE of the Stable Diffusion kind, FLUX's included
_PLAIN = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a model on disk: a folder with a config, and perhaps weights; or a single file."""

    name: str
    path: Path

    def nbytes(self, dtype: torch.dtype) -> int:
        """What its weights take in `dtype`, by the files' headers, or else by the config."""
        files = [self.path] if self.path.is_file() else self._files()
        if files:
            return sum(tensor_file.read(file).numel for file in files) * dtype.itemsize
        return sum(each.numel() for each in self.module().parameters()) * dtype.itemsize

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "config.json").read_bytes())
        return found

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module of its config, without values. Raises AttributeError for a class of neither library."""
        config = self.config()
        with torch.device("meta"):
            module: nn.Module
            if "_class_name" in config:
                module = getattr(diffusers, config["_class_name"]).from_config(config)
            else:
                kind = getattr(transformers, config["architectures"][0])
                module = kind(kind.config_class.from_dict(config))
            for parameter in (*module.parameters(), *module.buffers()):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        return module

    def _files(self) -> list[Path]:
        """Its weights; of several variants the plain one."""
        found = sorted(self.path.glob("*.safetensors"))
        return [path for path in found if _PLAIN.fullmatch(path.name)] or found


def components(source: Path, names: Sequence[str] = LOADED) -> list[Component]:
    """The parts of a model that are loaded: of a folder of several those of `names`."""
    if source.is_file() or (source / "config.json").is_file():
        return [Component(source.name, source)]
    return [Component(name, source / name) for name in names if (source / name / "config.json").is_file()]


def decoder_dtype(vae: Component, dtype: torch.dtype) -> torch.dtype:
    """SDXL's VAE says that it overflows in float16."""
    upcast = dtype == torch.float16 and vae.config().get("force_upcast", False)
    return torch.float32 if upcast and vae.config().get("latent_channels", 4) == 4 else dtype


def forward_bytes(denoiser: Component, dtype: torch.dtype, tokens: int, text_tokens: int) -> int:
    """The peak of a forward of `tokens` image tokens, in rows of 512 × 512 with `text_tokens` each.

    Raises KeyError for a model that is neither FLUX's transformer nor a UNet, or a ControlNet beside it, of
    Stable Diffusion.
    """
    module = denoiser.module(dtype)
    rows = max(1, tokens // (ROW_PX // TOKEN_PX) ** 2)
    prepare = _CALLS[type(module).__name__]

    def forward() -> object:
        with torch.device("meta"):
            return prepare(module, dtype, rows, text_tokens)()

    return peak_bytes(forward, [module])


def decode_bytes(vae: Component, dtype: torch.dtype, pixels: int) -> int:
    """The peak of decoding one picture of so many pixels."""
    module: Any = vae.module(dtype)
    side = math.isqrt(pixels) // CELL_PX
    latents = torch.empty(1, module.config.latent_channels, side, side, dtype=dtype, device="meta")
    return peak_bytes(lambda: module.decode(latents), [module])


def _flux(module: Any, dtype: torch.dtype, rows: int, text_tokens: int) -> Callable[[], object]:
    config, tokens = module.config, (ROW_PX // TOKEN_PX) ** 2
    inputs = {
        "hidden_states": torch.empty(rows, tokens, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.empty(rows, text_tokens, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.empty(rows, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.empty(rows, dtype=dtype),
        "guidance": torch.empty(rows) if config.guidance_embeds else None,
        "img_ids": torch.empty(tokens, 3),
        "txt_ids": torch.empty(text_tokens, 3),
    }
    return lambda: module(**inputs)


def _controlnet(module: Any, dtype: torch.dtype, rows: int, text_tokens: int) -> Callable[[], object]:
    pictures = torch.empty(rows, module.config.conditioning_channels, ROW_PX, ROW_PX, dtype=dtype)
    return _unet(partial(module, controlnet_cond=pictures), dtype, rows, text_tokens, module.config)


def _unet(
    module: Any, dtype: torch.dtype, rows: int, text_tokens: int, config: Any = None
) -> Callable[[], object]:
    config, side = config or module.config, ROW_PX // CELL_PX
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(rows, pooled, dtype=dtype), "time_ids": torch.empty(rows, 6)}
    inputs = {
        "sample": torch.empty(rows, config.in_channels, side, side, dtype=dtype),
        "timestep": torch.empty(rows),
        "encoder_hidden_states": torch.empty(rows, text_tokens, config.cross_attention_dim, dtype=dtype),
        "added_cond_kwargs": added,
    }
    return lambda: module(**inputs)


_CALLS: Mapping[str, Callable[[Any, torch.dtype, int, int], Callable[[], object]]] = {
    "FluxTransformer2DModel": _flux,
    "UNet2DConditionModel": _unet,
    "ControlNetModel": _controlnet,
}
