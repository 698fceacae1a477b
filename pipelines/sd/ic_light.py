"""IC-Light: offsets with which a UNet of Stable Diffusion 1.5 lights a picture anew.

A file (https://github.com/lllyasviel/IC-Light) has, for each tensor of the UNet, what is added to it. The
first convolution becomes wider: after the latents it reads those of the foreground and, from some files,
those of the background, four channels each.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import pad

from pipelines.adapters import tensor_file
from pipelines.adapters.tensor_file import TensorFile, check_finite, invalid, listed
from pipelines.sd.grid import CHANNELS
from pipelines.sd.kinds import kind_of

Shapes = Mapping[str, tuple[int, ...]]

FOREGROUND = 2 * CHANNELS
BACKGROUND = 3 * CHANNELS
_FIRST = "conv_in.weight"


@dataclass(frozen=True, slots=True, eq=False)
class IcLight:
    """Offsets for a UNet, in a file that has to stay until they are applied."""

    channels: int  # that the new UNet reads: 8, or 12 with a background
    nbytes: int  # of the new UNet, in the types of the one the offsets were read for
    file: TensorFile

    @property
    def reads_background(self) -> bool:
        return self.channels == BACKGROUND

    @torch.no_grad()
    def apply(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        """A new UNet on the same device in the same types, that reads `channels`, ready to be called.

        It is `unet`'s weights plus the offsets, added in float32, under fresh modules: neither hooks nor
        attention processors come along. `unet` stays as it was. Takes `nbytes`, and one tensor's work beside.
        Raises AssetError ("invalid_weights") where a sum is not finite.
        """
        with torch.device("meta"):
            made = UNet2DConditionModel.from_config(unet.config, in_channels=self.channels)
        tensors = {name: self._sum(name, weight) for name, weight in unet.state_dict().items()}
        check_finite(tensors)
        made.load_state_dict(tensors, assign=True)
        return made.eval().requires_grad_(False)

    def _sum(self, name: str, weight: Tensor) -> Tensor:
        offset = self.file.load([name])[name].to(weight.device, torch.float32)
        if name == _FIRST:  # what the base does not read has no weight there
            weight = pad(weight, (0, 0, 0, 0, 0, self.channels - weight.shape[1]))
        return offset.add_(weight).to(weight.dtype)


def read(path: Path, unet: UNet2DConditionModel) -> IcLight:
    """Offsets for this UNet, from a safetensors file that names them as diffusers does.

    Only the file's header is read. Raises AssetError ("invalid_weights") that says what does not fit.
    """
    file = tensor_file.read(path)
    channels = check(file.shapes, unet)
    weights = unet.state_dict()
    nbytes = sum(math.prod(shape) * weights[name].element_size() for name, shape in file.shapes.items())
    return IcLight(channels, nbytes, file)


def check(shapes: Shapes, unet: UNet2DConditionModel) -> int:
    """How many channels a UNet with these offsets reads: 8, or 12 with a background.

    Every tensor of the UNet has one of its shape, but for the first convolution's channels, and nothing is
    left over. Raises AssetError ("invalid_weights") otherwise.
    """
    _check_base(unet)
    if _FIRST not in shapes:
        raise invalid(f"The file is not one of IC-Light: {_what(shapes)}.")
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    unknown = [name for name in shapes if name not in expected]
    missing = [name for name in expected if name not in shapes]
    if unknown:
        raise invalid(f"The file is not one of IC-Light: this model has no {listed(unknown)}.")
    if missing:
        raise invalid(f"IC-Light's file is not complete. It lacks {listed(missing)}.")
    channels = _channels(shapes[_FIRST])
    out, _, *kernel = expected[_FIRST]
    expected[_FIRST] = (out, channels, *kernel)
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise invalid(
                f"IC-Light's file was made for another model: {name} has the shape {list(shape)} "
                f"where {list(expected[name])} is expected."
            )
    return channels


def _check_base(unet: UNet2DConditionModel) -> None:
    kind = kind_of({**unet.config, "_class_name": type(unet).__name__})
    if kind != "sd1":
        name = {"sd2": "Stable Diffusion 2", "sdxl": "SDXL"}[kind]
        raise invalid(f"IC-Light is for Stable Diffusion 1.5, the model is {name}.")


def _channels(shape: tuple[int, ...]) -> int:
    channels = shape[1] if len(shape) == 4 else None
    if channels in (FOREGROUND, BACKGROUND):
        return channels
    what = f"{channels} channels" if channels else f"a tensor of shape {list(shape)}"
    raise invalid(
        f"The file is not one of IC-Light: its {_FIRST} is for {what}, IC-Light's for {FOREGROUND} "
        f"(with a foreground) or {BACKGROUND} (with a background as well)."
    )


# How files of other kinds name their tensors.
_OTHERS = {
    r"lora": "it is a LoRA",
    r"^control_model\.|^controlnet_": "it is a ControlNet",
    r"^(model\.)?(diffusion_model\.)?input_blocks\.": (
        "its tensors have the names of the original Stable Diffusion, diffusers' are needed"
    ),
}


def _what(shapes: Shapes) -> str:
    for pattern, what in _OTHERS.items():
        if any(re.search(pattern, name) for name in shapes):
            return what
    return f"it has no {_FIRST}. What it has is {listed(shapes)}"
