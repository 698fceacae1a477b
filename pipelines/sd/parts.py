"""What a Stable Diffusion model is made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Kind = Literal["sd1", "sd2", "sdxl"]


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A Stable Diffusion model's components, on one device in one dtype.

    The VAE alone is float32 where the others are float16 and the checkpoint says that its VAE
    overflows there (`force_upcast`, which SDXL's has).
    """

    kind: Kind
    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    tokenizers: tuple[Any, ...]  # CLIPTokenizer, one or two (SDXL)
    text_encoders: tuple[Any, ...]  # CLIPTextModel; SDXL's second is a CLIPTextModelWithProjection
    scheduler_config: Mapping[str, Any]  # the checkpoint's, with "_class_name"

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.unet, self.vae, *self.text_encoders)

    @property
    def nbytes(self) -> int:
        """What the weights take on the device."""
        return sum(tensor.nbytes for module in self.modules for tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()
