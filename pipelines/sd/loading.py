"""How a Stable Diffusion model comes in: from a diffusers folder, the Hub, or a single file.

Its files may be a stranger's. Only safetensors are read, each header is checked before any data, each
component is of a class named here, and a component's tensors must fit its config one by one. Modules are
made without values, so a config can claim no memory; what it claims is bounded before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from pipelines.adapters.tensor_file import check_finite, invalid, listed
from pipelines.sd.checkpoints import Checkpoint, Folder, SingleFile, Stored, stored_in_folder, stored_unet
from pipelines.sd.kinds import Config, kind_of
from pipelines.sd.parts import Kind, Parts
from pipelines.sd.repository import fetch, read_config

CONFIGS: Mapping[Kind, Path] = {kind: Path(__file__).parent / "configs" / kind for kind in get_args(Kind)}


def load(
    source: Path | str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    variant: str | None = None,
    unet: Path | None = None,
    configs: Mapping[Kind, Path] = CONFIGS,
) -> Parts:
    """A model's components on `device` in `dtype`, ready to be called.

    `source` is a local diffusers folder or a local safetensors file in the original layout (a Path), or a Hub
    id (a str). `variant`, such as "fp16", is of files in a folder; components without it use the plain ones.
    `unet` replaces the UNet: a folder, or a file named as diffusers or the original names it, that fits the
    base. `configs` has a folder for each kind, with what single files do not say. Only a Hub id may reach
    the network. Raises AssetError ("invalid_weights", "file_download_error") that says what is wrong.
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
    for component in (denoiser, autoencoder, *encoders):
        component.check()
    overflows = kind == "sdxl" and dtype == torch.float16 and autoencoder.module.config.force_upcast
    return Parts(
        kind,
        denoiser.filled(device, dtype),
        autoencoder.filled(device, torch.float32 if overflows else dtype),
        tuple(tokenizer for tokenizer, _ in texts),
        tuple(encoder.filled(device, dtype) for encoder in encoders),
        scheduler,
    )


def _open(source: Path | str, variant: str | None, configs: Mapping[Kind, Path]) -> Checkpoint:
    if isinstance(source, str):
        return Folder(fetch(source, variant), variant)
    if source.is_dir():
        return Folder(source, variant)
    if not source.is_file():
        raise invalid(f"There is no model at {source}.")
    return SingleFile(source, configs)


@dataclass(frozen=True, slots=True)
class _Component:
    """A module without values, and where its values are."""

    name: str
    module: Any
    stored: Stored

    def check(self) -> None:
        """Raise AssetError unless the tensors on disk are those of the module, each in its shape."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        found = self.stored.shapes()
        unknown, missing = found.keys() - expected.keys(), expected.keys() - found.keys()
        if unknown:
            raise invalid(f"The {self.name} has no place for {listed(sorted(unknown))}.")
        if missing:
            raise invalid(f"The {self.name} is not complete. It lacks {listed(sorted(missing))}.")
        for name, shape in found.items():
            if shape != expected[name]:
                raise invalid(
                    f"The {self.name} does not fit its config: {name} has the shape {list(shape)} "
                    f"where {list(expected[name])} is expected."
                )

    def filled(self, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The module with its values, which must be finite in `dtype`."""
        tensors = self.stored.load()
        for name in tensors:
            tensors[name] = tensors[name].to(device, dtype)
        check_finite(tensors)
        self.module.load_state_dict(tensors, assign=True)
        for part in self.module.modules():
            if isinstance(part, CLIPTextEmbeddings):  # a buffer that is not in files
                part.position_ids = torch.arange(part.position_embedding.num_embeddings, device=device)[None]
        return self.module.eval().requires_grad_(False)


def _unet(checkpoint: Checkpoint) -> _Component:
    module = _empty("unet", UNet2DConditionModel, checkpoint.config("unet"))
    return _Component("model's unet", module, checkpoint.stored("unet", module))


def _autoencoder(checkpoint: Checkpoint) -> _Component:
    config = checkpoint.config("vae")
    if config.get("_class_name") != "AutoencoderKL":
        raise invalid(f"The model's VAE is a {str(config.get('_class_name'))[:80]}, not an AutoencoderKL.")
    for key, ours in _LATENTS.items():
        if config.get(key, ours) != ours:
            raise invalid(f"The model's VAE is not one of Stable Diffusion 1, 2 or XL: {key} is not {ours}.")
    module = _empty("vae", AutoencoderKL, config)
    return _Component("model's vae", module, checkpoint.stored("vae", module))


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


def _text(checkpoint: Checkpoint, suffix: str) -> tuple[Any, _Component]:
    """A tokenizer and its encoder. Of the encoder's config, only what shapes it is read.

    The end token is the tokenizer's: published configs say 2, which makes the encoder take the highest id
    for the end, and ids of words learned later are higher.
    """
    name = f"text_encoder{suffix}"
    given = checkpoint.config(name)
    if given.get("model_type") != "clip_text_model":
        raise invalid(f"The model's {name} is a {str(given.get('model_type'))[:80]}, not CLIP's.")
    fields = {key: given[key] for key in _TEXT_FIELDS if key in given}
    _check_sizes(name, fields)
    config = _made(name, lambda: CLIPTextConfig(**fields, **dict.fromkeys(_TEXT_IDS)))
    tokenizer = checkpoint.tokenizer(f"tokenizer{suffix}", config.max_position_embeddings)
    if len(tokenizer) > config.vocab_size:
        count = f"{len(tokenizer)} words, its {name} {config.vocab_size}"
        raise invalid(f"The model's tokenizer{suffix} has {count}.")
    for key in _TEXT_IDS:
        setattr(config, key, getattr(tokenizer, key))
    module = _made(name, lambda: _TEXT_CLASSES[name](config))
    return tokenizer, _Component(f"model's {name}", module, checkpoint.stored(name, module))


def _replacement(path: Path, base: Checkpoint, variant: str | None) -> _Component:
    """A UNet in place of the base's: one of its kind in a folder, or one of its config in a file."""
    if not path.is_dir():
        config = base.config("unet")
        module = _empty("unet", UNet2DConditionModel, config)
        return _Component("other UNet", module, stored_unet(path, config))
    folder = path if (path / "config.json").is_file() else path / "unet"
    config = read_config(folder / "config.json")
    if (kind := kind_of(config)) != base.kind:
        raise invalid(f"The other UNet is one of {kind}, the model is {base.kind}.")
    module = _empty("unet", UNet2DConditionModel, config)
    return _Component("other UNet", module, stored_in_folder(folder, variant, module))


def _empty(name: str, kind: Any, config: Config) -> Any:
    """A diffusers module by its config, without values."""
    if config.get("quantization_config") is not None:
        raise invalid(f"The model's {name} is quantized, which is not supported.")
    _check_sizes(name, config)
    return _made(name, lambda: kind.from_config(dict(config)))


# What diffusers and transformers raise for settings that do not go together. Nothing is allocated meanwhile.
_MISCONFIGURED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)


def _made(name: str, make: Callable[[], Any]) -> Any:
    try:
        with torch.device("meta"):
            return make()
    except _MISCONFIGURED as error:
        raise invalid(f"The config of the model's {name} is not usable: {str(error)[:300]}") from error


_MOST = 1 << 17  # any size; CLIP's vocabulary has 49,408 words
_MOST_LAYERS = 64  # of one kind in one block; SDXL's second text encoder has 32
_MOST_BLOCKS = 8  # entries in a list; UNets and VAEs have 3 or 4 blocks


def _check_sizes(name: str, config: Config) -> None:
    """Raise AssetError for numbers that would make a module larger than any real one."""
    for key, value in config.items():
        most = _MOST_LAYERS if "layers" in key else _MOST
        if any(not 0 <= number <= most for number in _numbers(value)):
            raise invalid(f"The config of the model's {name} is not usable: {key[:80]} is {str(value)[:80]}.")


def _numbers(value: Any, depth: int = 0) -> Iterator[int]:
    """The whole numbers in a value; a list that is too long or deep yields one that is refused."""
    if isinstance(value, list | tuple):
        if len(value) > _MOST_BLOCKS or depth > 2:
            yield -1
        else:
            for each in value:
                yield from _numbers(each, depth + 1)
    elif isinstance(value, int):
        yield value


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
