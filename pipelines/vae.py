"""Through a VAE. What overflows its dtype, as SDXL's own does in float16, is computed again in float32."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from pipelines.speed.regions import Regions

SHARED_CELLS = 4096  # of 8 × 8 pixels in one decode; beyond 512 × 512 pixels company saves nothing


def compile_decoder(vae: Any) -> None:
    """Have `decode` run the decoder compiled, in one graph for all sizes."""
    Regions(vae, ("Decoder",)).is_compiling = True


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """[3, height, width] in [-1, 1] → the posterior's mode, float32, not scaled."""

    def mode(vae: Any) -> Tensor:
        latents: Tensor = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()
        return latents[0].float()

    return _finite(mode, vae)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents, scaled as the VAE has them → [3, height, width] in about [-1, 1], float32."""
    return _finite(lambda vae: _decoded(vae, latents[None])[0], vae)


def decode_together(vae: Any, latents: Sequence[Tensor]) -> dict[int, Tensor]:
    """As `decode`, of those that are worth it, by their places: small ones of which several are alike."""
    places: dict[torch.Size, list[int]] = {}
    for place, each in enumerate(latents):
        places.setdefault(each.shape, []).append(place)
    pixels: dict[int, Tensor] = {}
    for shape, alike in places.items():
        most = SHARED_CELLS // (shape[-2] * shape[-1])
        if most < 2:
            continue
        for batch in (alike[at : at + most] for at in range(0, len(alike), most)):
            found = _decoded(vae, torch.stack([latents[place] for place in batch]))
            sound = found.flatten(1).isfinite().all(1).tolist()  # the others: `decode` knows what to do
            pixels |= {place: each for place, each, ok in zip(batch, found, sound, strict=True) if ok}
    return pixels


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    decoded: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return decoded.float()


def _finite(result: Callable[[Any], Tensor], vae: Any) -> Tensor:
    """The result; not finite only where float32 does not help. The VAE itself, which others use, stays so."""
    found = result(vae)
    if vae.dtype == torch.float32 or torch.isfinite(found).all():
        return found
    return result(deepcopy(vae).float())
