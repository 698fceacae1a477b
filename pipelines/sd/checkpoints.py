"""Where a Stable Diffusion model lies: in a diffusers folder, or in one file of the original layout.

Both answer the same questions, component by component: its config, its tensors under the names of
diffusers' and transformers' modules, its tokenizer. What is no such model is refused by what it is.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn

from pipelines.adapters import tensor_file
from pipelines.adapters.tensor_file import TensorFile, TensorLimits, invalid, listed
from pipelines.sd import vocabulary
from pipelines.sd.kinds import Config, check_encoders, check_input, kind_of
from pipelines.sd.parts import Kind
from pipelines.sd.repository import TEXT_ENCODERS, check_variant, choose, read_config

# An SDXL file has 2,515 tensors; with the running averages of training, about 4,200. Beside the weights lie
# numbers of positions (integers) and empty tensors that say how the model predicts.
LIMITS = TensorLimits(tensors=5000, dtypes=("F64", "F32", "F16", "BF16", "I64", "I32"), empty=True)

Tensors = dict[str, Tensor]
Translate = Callable[[Tensors], Tensors]  # from a file's names and layouts to a module's; on any device


@dataclass(frozen=True, slots=True)
class Stored:
    """A component's tensors on disk: those of some files, and how they become the module's."""

    parts: Sequence[tuple[TensorFile, Collection[str]]]
    translate: Translate

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By the module's names; no data is read."""
        empty: Tensors = {}
        for file, names in self.parts:
            empty |= {name: torch.empty(file.shapes[name], device="meta") for name in names}
        return {name: tuple(tensor.shape) for name, tensor in self._translated(empty).items()}

    def load(self) -> Tensors:
        """On the CPU, in the files' dtypes."""
        tensors: Tensors = {}
        for file, names in self.parts:
            tensors |= file.load(names)
        return self._translated(tensors)

    def _translated(self, tensors: Tensors) -> Tensors:
        try:
            return self.translate(tensors)
        except LookupError as error:  # a name that must be there is not, or a shape cannot be cut
            raise invalid(f"The model lacks a tensor, or has it in an unknown form: {error}.") from error


class Checkpoint(Protocol):
    """A model on disk. Every method raises AssetError where its part is missing or malformed."""

    @property
    def kind(self) -> Kind: ...

    def config(self, component: str) -> Config:
        """Of `unet`, `vae`, `text_encoder` or `text_encoder_2`."""
        ...

    def stored(self, component: str, module: nn.Module) -> Stored:
        """The component's tensors, named as `module` names its own."""
        ...

    def tokenizer(self, name: str, length: int) -> Any:
        """`tokenizer` or `tokenizer_2`, for texts of `length` tokens."""
        ...

    def scheduler(self) -> dict[str, Any]:
        """The config of the checkpoint's scheduler."""
        ...


class Folder:
    """A diffusers pipeline's folder. Components without the variant use the plain files."""

    def __init__(self, root: Path, variant: str | None = None) -> None:
        if not (root / "unet" / "config.json").is_file():
            raise invalid(f"The model is not a Stable Diffusion model: {_what_folder(root)}.")
        if variant is not None:
            check_variant(root, variant)
        self._root = root
        self._variant = variant

    @cached_property
    def kind(self) -> Kind:
        kind = kind_of(self.config("unet"))
        check_encoders(kind, [each for each in TEXT_ENCODERS if (self._root / each).is_dir()])
        return kind

    def config(self, component: str) -> Config:
        return read_config(self._root / component / "config.json")

    def stored(self, component: str, module: nn.Module) -> Stored:
        return stored_in_folder(self._root / component, self._variant, module)

    def tokenizer(self, name: str, length: int) -> Any:
        return vocabulary.read(self._root / name, length)

    def scheduler(self) -> dict[str, Any]:
        return read_config(self._root / "scheduler" / "scheduler_config.json")


class SingleFile:
    """One safetensors file with everything, named as CompVis' and Stability AI's code names it.

    What its tensors do not say is in the folder of configs for its kind.
    """

    def __init__(self, path: Path, configs: Mapping[Kind, Path]) -> None:
        self._file = tensor_file.read(path, limits=LIMITS)
        self.kind = _kind_of_file(self._file.shapes)
        self._configs = configs[self.kind]

    def config(self, component: str) -> Config:
        return read_config(self._configs / component / "config.json")

    def stored(self, component: str, module: nn.Module) -> Stored:
        prefix = _PREFIXES[self.kind][component]
        names = [name for name in self._file.shapes if name.startswith(prefix)]
        if not names:
            raise invalid(f"The file lacks the model's {component}: no name in it begins with {prefix}")
        return Stored([(self._file, names)], self._translation(component, module, prefix))

    def tokenizer(self, name: str, length: int) -> Any:
        folder = self._configs / name
        has_words = any((folder / file).is_file() for file in ("vocab.json", "tokenizer.json"))
        return (vocabulary.read if has_words else vocabulary.openai)(folder, length)

    def scheduler(self) -> dict[str, Any]:
        config = read_config(self._configs / "scheduler" / "scheduler_config.json")
        prediction = self._prediction()
        if prediction:
            config["prediction_type"] = prediction
        if _ZERO_SNR in self._file.shapes:
            config["rescale_betas_zero_snr"] = True
        return config

    def _translation(self, component: str, module: nn.Module, prefix: str) -> Translate:
        if component == "unet":
            return partial(_unet_from_ldm, config=self.config(component))
        if component == "vae":
            return partial(convert_ldm_vae_checkpoint, config=self.config(component))
        if prefix.endswith(".transformer."):
            return lambda tensors: _renamed(convert_ldm_clip_checkpoint(tensors), module)
        return lambda tensors: _renamed(convert_open_clip_checkpoint(module, tensors, prefix), module)

    def _prediction(self) -> str | None:
        """What the UNet predicts, where the file says so: by a mark, a note, or the weights of SD2."""
        if _V_PREDICTION in self._file.shapes:
            return "v_prediction"
        for key in ("modelspec.prediction_type", "modelspec.predict_key"):
            if prediction := _PREDICTIONS.get(self._file.notes.get(key, "")):
                return prediction
        if self.kind == "sd2" and _TELLING in self._file.shapes:
            spread = self._file.load([_TELLING])[_TELLING].float().std(correction=0)
            return "v_prediction" if spread > _TELLING_SPREAD else "epsilon"
        return None


_UNET = "model.diffusion_model."
_FIRST = "input_blocks.0.0.weight"
_SHARED = {"unet": _UNET, "vae": "first_stage_model."}
_PREFIXES: Mapping[Kind, Mapping[str, str]] = {
    "sd1": _SHARED | {"text_encoder": "cond_stage_model.transformer."},
    "sd2": _SHARED | {"text_encoder": "cond_stage_model.model."},
    "sdxl": _SHARED
    | {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
_REFINER_TEXT = "conditioner.embedders.0.model."
_SIZES = f"{_UNET}label_emb."

# The marks are ComfyUI's (https://github.com/Comfy-Org/ComfyUI, comfy/supported_models.py), the notes those
# of https://github.com/Stability-AI/ModelSpec. SD2 for 768 pixels predicts velocities, for 512 noise, in the
# same shapes; the spread of one layer tells them apart, a measure of ComfyUI's too.
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"
_EDM = ("edm_mean", "edm_vpred.sigma_max")  # Playground 2.5, CosXL
_PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
_TELLING = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_TELLING_SPREAD = 0.09


def _kind_of_file(names: Mapping[str, tuple[int, ...]]) -> Kind:
    """By the text encoders."""
    if _UNET + _FIRST not in names:
        raise invalid(f"The file is not a Stable Diffusion model: {_what_file(names)}.")
    if any(mark in names for mark in _EDM):
        raise invalid("The file is a model for EDM's noise, such as Playground 2.5, which is not supported.")
    _check_input(names[_UNET + _FIRST])

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    for kind, prefixes in _PREFIXES.items():
        if all(has(prefix) for component, prefix in prefixes.items() if component in TEXT_ENCODERS):
            return kind
    if has(_REFINER_TEXT) and has(_SIZES):
        raise invalid("The file is SDXL's refiner; a base model is needed.")
    raise invalid("The file has a UNet, but not the text encoders of Stable Diffusion 1, 2 or XL.")


# How files of other kinds name their tensors.
_OTHERS = {
    r"lora_(unet|te|transformer|A|B|up|down)|\.lora\.|\.hada_w|\.lokr_": "it is a LoRA",
    r"(^|\.)(double_blocks|single_transformer_blocks)\.": "it is a FLUX model",
    r"(^|\.)joint_blocks\.": "it is a Stable Diffusion 3 model",
    r"^control_model\.|^controlnet_|input_hint_block": "it is a ControlNet",
    r"^ip_adapter\.|^image_proj\.": "it is an IP adapter",
    r"^emb_params$|^string_to_param|^clip_[lg]$": "it is an embedding",
    r"^(down_blocks|input_blocks)\.0\.": "it is a UNet without the rest of a model",
    r"^(encoder|decoder)\.(conv_in|mid)": "it is a VAE without the rest of a model",
}


def _what_file(names: Collection[str]) -> str:
    for pattern, what in _OTHERS.items():
        if any(re.search(pattern, name) for name in names):
            return what
    return f"what it has is {listed(names)}"


def _what_folder(root: Path) -> str:
    if (root / "model_index.json").is_file():
        name = read_config(root / "model_index.json").get("_class_name")
        return f"it is a {str(name)[:80]}"
    return "it has no unet/config.json"


def stored_in_folder(folder: Path, variant: str | None, module: nn.Module) -> Stored:
    """A component's tensors in a folder of its own."""
    files = [tensor_file.read(path, limits=LIMITS) for path in choose(folder, variant)]
    return Stored([(file, file.shapes) for file in files], partial(_renamed, module=module))


def stored_unet(path: Path, config: Config) -> Stored:
    """A UNet's tensors in a file of any naming, alone or among the others of a model."""
    file = tensor_file.read(path, limits=LIMITS)
    first = next((name for name in ("conv_in.weight", _UNET + _FIRST, _FIRST) if name in file.shapes), None)
    if first is None:
        raise invalid(f"The file is not a UNet: {_what_file(file.shapes)}.")
    _check_input(file.shapes[first])
    if first == "conv_in.weight":
        return Stored([(file, file.shapes)], lambda tensors: tensors)
    names = [name for name in file.shapes if name.startswith(first.removesuffix(_FIRST))]
    return Stored([(file, names)], partial(_unet_from_ldm, config=config))


def _unet_from_ldm(tensors: Tensors, config: Config) -> Tensors:
    """Raises AssetError for tensors that the conversion would pass over in silence."""
    prefixed = {_UNET + name.removeprefix(_UNET): tensor for name, tensor in tensors.items()}
    found: Tensors = convert_ldm_unet_checkpoint(prefixed, config)
    used = {id(tensor) for tensor in found.values()}
    idle = [name for name, tensor in tensors.items() if id(tensor) not in used]
    if idle:
        raise invalid(f"The file's UNet is not Stable Diffusion's: there is no place for {listed(idle)}.")
    return found


def _check_input(shape: tuple[int, ...]) -> None:
    """`shape` is that of the UNet's first convolution."""
    check_input(shape[1] if len(shape) == 4 else None)


# What the VAEs of 2022 call the layers of their attention.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")


def _renamed(tensors: Tensors, module: nn.Module) -> Tensors:
    """With the names that today's modules use; without what a text encoder has no use for."""
    prefix = "" if hasattr(module, "text_model") else "text_model."
    layers = getattr(module.config, "num_hidden_layers", None)
    found: Tensors = {}
    for name, tensor in tensors.items():
        ours = _OLD.sub(lambda match: _OLD_ATTENTION[match[0]], name).removeprefix(prefix)
        if layers is None or not _is_idle(ours, layers, projects=not prefix):
            found[ours] = tensor
    return found


_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d{1,4})\.")


def _is_idle(name: str, layers: int, projects: bool) -> bool:
    """Whether a text encoder of so many layers never reads the tensor.

    SD2 stops before its last layer, which files may hold all the same.
    """
    if layer := _LAYER.match(name):
        return int(layer[1]) >= layers
    if name == "text_projection.weight":
        return not projects
    return name.endswith(("position_ids", "logit_scale"))
