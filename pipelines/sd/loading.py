"""How a Stable Diffusion model comes in: from a diffusers folder, the Hub, or a single file.

Its files may be a stranger's. Only safetensors are read, each header is checked before any data, each
component is of a class named here, and a component's tensors must fit its config one by one. Modules are
made without values, so a config can claim no memory; what it claims is bounded before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipelines.adapters.tensor_file import invalid
from pipelines.sd.checkpoints import Checkpoint, Folder, SingleFile, stored_in_folder, stored_unet
from pipelines.sd.component import Component, check_sizes, made
from pipelines.sd.kinds import Config, kind_of
from pipelines.sd.parts import Kind, Parts
from pipelines.sd.repository import fetch, read_config
from schemas.errors import AssetError

CONFIGS: Mapping[Kind, Path] = {kind: Path(__file__).parent / "configs" / kind for kind in get_args(Kind)}


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """A model whose files were found to be whole and to fit together, before any of its values is read."""

    kind: Kind
    dtype: torch.dtype
    unet: Component
    vae: Component
    encoders: Sequence[Component]
    tokenizers: Sequence[Any]
    scheduler_config: Mapping[str, Any]
    has_other_unet: bool = False  # in place of the model's own

    @property
    def nbytes(self) -> int:
        """What the weights will take on the device."""
        return sum(
            parameter.numel() * dtype.itemsize
            for component, dtype in self._components()
            for parameter in component.module.parameters()
        )

    def load(self, device: torch.device | str) -> Parts:
        """The components on `device`. Raises AssetError, or UnfitUnet, for values that are not finite."""
        (denoiser, dtype), *others = self._components()
        try:
            unet = denoiser.filled(device, dtype)
        except AssetError as error:
            if self.has_other_unet:
                raise UnfitUnet(error.message, error.kind, error.ctx) from error
            raise
        vae, *encoders = (component.filled(device, dtype) for component, dtype in others)
        return Parts(self.kind, unet, vae, tuple(self.tokenizers), tuple(encoders), self.scheduler_config)

    def _components(self) -> list[tuple[Component, torch.dtype]]:
        overflows = (
            self.kind == "sdxl" and self.dtype == torch.float16 and self.vae.module.config.force_upcast
        )
        vae_dtype = torch.float32 if overflows else self.dtype
        encoders = [(encoder, self.dtype) for encoder in self.encoders]
        return [(self.unet, self.dtype), (self.vae, vae_dtype), *encoders]


class UnfitUnet(AssetError):
    """The UNet that is to replace the model's own cannot."""


def inspect(
    source: Path | str,
    dtype: torch.dtype,
    *,
    variant: str | None = None,
    unet: Path | None = None,
    configs: Mapping[Kind, Path] = CONFIGS,
) -> Blueprint:
    """A model's components, checked and without values, to be loaded in `dtype`.

    `source` is a local diffusers folder or a local safetensors file in the original layout (a Path), or a Hub
    id (a str). `variant`, such as "fp16", is of files in a folder; components without it use the plain ones.
    `unet` replaces the UNet: a folder, or a file named as diffusers or the original names it, that fits the
    base. `configs` has a folder for each kind, with what single files do not say. Only a Hub id may reach
    the network. Raises AssetError ("invalid_weights", "file_download_error") that says what is wrong,
    UnfitUnet where that is `unet`.
    """
    checkpoint = _open(source, variant, configs)
    kind = checkpoint.kind
    suffixes = ("", "_2") if kind == "sdxl" else ("",)
    texts = [_text(checkpoint, suffix) for suffix in suffixes]
    encoders = [encoder for _, encoder in texts]
    autoencoder = _autoencoder(checkpoint)
    denoiser = _replacement(unet, checkpoint, variant) if unet else _unet(checkpoint)
    scheduler = _checked_scheduler(checkpoint.scheduler())
    _check_widths(denoiser.module.config, [encoder.module.config for encoder in encoders])
    for component in (autoencoder, *encoders) if unet else (denoiser, autoencoder, *encoders):
        component.check()
    tokenizers = [tokenizer for tokenizer, _ in texts]
    return Blueprint(
        kind, dtype, denoiser, autoencoder, encoders, tokenizers, scheduler, has_other_unet=unet is not None
    )


def _open(source: Path | str, variant: str | None, configs: Mapping[Kind, Path]) -> Checkpoint:
    if isinstance(source, str):
        return Folder(fetch(source, variant), variant)
    if source.is_dir():
        return Folder(source, variant)
    if not source.is_file():
        raise invalid(f"There is no model at {source}.")
    return SingleFile(source, configs)


def _unet(checkpoint: Checkpoint) -> Component:
    module = _empty("unet", UNet2DConditionModel, checkpoint.config("unet"))
    return Component("model's unet", module, checkpoint.stored("unet", module))


def _autoencoder(checkpoint: Checkpoint) -> Component:
    config = checkpoint.config("vae")
    if config.get("_class_name") != "AutoencoderKL":
        raise invalid(f"The model's VAE is a {str(config.get('_class_name'))[:80]}, not an AutoencoderKL.")
    for key, ours in _LATENTS.items():
        if config.get(key, ours) != ours:
            raise invalid(f"The model's VAE is not one of Stable Diffusion 1, 2 or XL: {key} is not {ours}.")
    module = _empty("vae", AutoencoderKL, config)
    return Component("model's vae", module, checkpoint.stored("vae", module))


_LATENTS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "latents_mean": None,  # Playground 2.5 has these two
    "latents_std": None,
}
_TEXT_CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)
_TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _text(checkpoint: Checkpoint, suffix: str) -> tuple[Any, Component]:
    """A tokenizer and its encoder. Of the encoder's config, only what shapes it is read.

    The end token is the tokenizer's: published configs say 2, which makes the encoder take the highest id
    for the end, and ids of words learned later are higher.
    """
    name = f"text_encoder{suffix}"
    given = checkpoint.config(name)
    if given.get("model_type") != "clip_text_model":
        raise invalid(f"The model's {name} is a {str(given.get('model_type'))[:80]}, not CLIP's.")
    fields = {key: given[key] for key in _TEXT_FIELDS if key in given}
    check_sizes(f"model's {name}", fields)
    config = made(f"model's {name}", lambda: CLIPTextConfig(**fields, **dict.fromkeys(_TEXT_IDS)))
    tokenizer = checkpoint.tokenizer(f"tokenizer{suffix}", config.max_position_embeddings)
    if len(tokenizer) > config.vocab_size:
        count = f"{len(tokenizer)} words, its {name} {config.vocab_size}"
        raise invalid(f"The model's tokenizer{suffix} has {count}.")
    for key in _TEXT_IDS:
        setattr(config, key, getattr(tokenizer, key))
    module = made(f"model's {name}", lambda: _TEXT_CLASSES[name](config))
    return tokenizer, Component(f"model's {name}", module, checkpoint.stored(name, module))


def _replacement(path: Path, base: Checkpoint, variant: str | None) -> Component:
    """A UNet in place of the base's, checked. Raises UnfitUnet."""
    try:
        component = _other_unet(path, base, variant)
        component.check()
    except AssetError as error:
        raise UnfitUnet(error.message, error.kind, error.ctx) from error
    return component


def _other_unet(path: Path, base: Checkpoint, variant: str | None) -> Component:
    """One of the base's kind in a folder, or one of its config in a file."""
    if not path.is_dir():
        config = base.config("unet")
        module = _empty("unet", UNet2DConditionModel, config)
        return Component("other UNet", module, stored_unet(path, config))
    folder = path if (path / "config.json").is_file() else path / "unet"
    config = read_config(folder / "config.json")
    if (kind := kind_of(config)) != base.kind:
        raise invalid(f"The other UNet is one of {kind}, the model is {base.kind}.")
    module = _empty("unet", UNet2DConditionModel, config)
    return Component("other UNet", module, stored_in_folder(folder, variant, module))


def _empty(name: str, kind: Any, config: Config) -> Any:
    """A diffusers module by its config, without values."""
    if config.get("quantization_config") is not None:
        raise invalid(f"The model's {name} is quantized, which is not supported.")
    check_sizes(f"model's {name}", config)
    return made(f"model's {name}", lambda: kind.from_config(dict(config)))


_TIME_IDS = 6  # the sizes and the crop that SDXL's UNet reads


def _check_widths(unet: Config, encoders: Sequence[Any]) -> None:
    """The UNet reads what the text encoders give."""
    width = sum(config.hidden_size for config in encoders)
    if unet["cross_attention_dim"] != width:
        raise invalid(
            f"The UNet reads texts of width {unet['cross_attention_dim']}, the text encoders give {width}."
        )
    if unet["addition_embed_type"] == "text_time":
        beside, each = unet["projection_class_embeddings_input_dim"], unet["addition_time_embed_dim"]
        pooled = encoders[-1].projection_dim
        if not isinstance(each, int) or beside != pooled + _TIME_IDS * each:
            raise invalid(
                f"The UNet reads {beside} numbers beside the text, not {pooled} and {_TIME_IDS} sizes."
            )


def _checked_scheduler(config: dict[str, Any]) -> Mapping[str, Any]:
    name = config.get("_class_name")
    if not isinstance(name, str) or name.startswith(("EDM", "FlowMatch")):
        raise invalid(f"The model's scheduler, {str(name)[:80]}, is not one for Stable Diffusion's noise.")
    return config
