"""A VAE whose numbers do not fit its dtype."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from pipelines import images, vae
from schemas.errors import NotFinite


@pytest.fixture
def plain(flux_folder: Path) -> Any:
    return AutoencoderKL.from_pretrained(flux_folder, subfolder="vae").requires_grad_(False)


@pytest.fixture
def loud(plain: Any) -> Iterator[Any]:
    """The same picture by way of numbers that only float32 holds, as SDXL's own VAE has them."""
    made = copy.deepcopy(plain)
    for norm in (made.decoder.conv_norm_out, made.encoder.conv_norm_out):
        norm.eps = 0.0
    for before in (made.decoder.up_blocks[-1].resnets[-1], made.encoder.mid_block.resnets[-1]):
        before.register_forward_hook(lambda module, inputs, output: output * 1e6)
    yield made


def test_t30_what_overflows_in_half_precision_is_computed_again_in_float32(plain: Any, loud: Any) -> None:
    latents = torch.randn(plain.config.latent_channels, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(plain, latents)
    loud.half()
    assert not torch.isfinite(loud.decode(latents[None].half(), return_dict=False)[0]).all()
    torch.testing.assert_close(vae.decode(loud, latents), expected, atol=0.02, rtol=0)
    pixels = expected.clamp(-1, 1)
    torch.testing.assert_close(vae.encode(loud, pixels), vae.encode(plain, pixels), atol=0.05, rtol=0.02)
    assert loud.dtype == torch.float16  # the others that use it see no change


def test_t30_what_is_not_finite_in_float32_either_makes_no_picture(plain: Any) -> None:
    latents = torch.full((plain.config.latent_channels, 6, 8), torch.nan)
    with pytest.raises(NotFinite, match="overflowed"):
        images.from_tensor(vae.decode(plain.half(), latents))
