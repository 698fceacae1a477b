"""Through a VAE. What overflows its dtype, as SDXL's own does in float16, is computed again in float32."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """[3, height, width] in [-1, 1] → the posterior's mode, float32, not scaled."""

    def mode(vae: Any) -> Tensor:
        latents: Tensor = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()
        return latents[0].float()

    return _finite(mode, vae)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents, scaled as the VAE has them → [3, height, width] in about [-1, 1], float32."""

    def pixels(vae: Any) -> Tensor:
        decoded: Tensor = vae.decode(latents[None].to(vae.dtype), return_dict=False)[0]
        return decoded[0].float()

    return _finite(pixels, vae)


def _finite(result: Callable[[Any], Tensor], vae: Any) -> Tensor:
    """The result; not finite only where float32 does not help. The VAE itself, which others use, stays so."""
    found = result(vae)
    if vae.dtype == torch.float32 or torch.isfinite(found).all():
        return found
    return result(deepcopy(vae).float())
