"""Autoencoders of the world: FLUX's with 16 channels, and Stable Diffusion's with 4, begun as FLUX's."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from pipelines.preprocess import canny
from pipelines.zoo import world
from pipelines.zoo.training.loop import Draw, Job, Report, fit

_KL = 1.5e-3
_WHOLE = 0.7  # of the training, after which whole pictures are shown instead of parts
_PART_PX = 64


def make(channels: int) -> Any:
    """An untrained one."""
    torch.manual_seed(1)
    projected = channels == 4  # as Stable Diffusion's, unlike FLUX's
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 64),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        use_quant_conv=projected,
        use_post_quant_conv=projected,
        sample_size=world.SIDE_PX,
    )
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if ".conv2." in name:
                weight.zero_()
        last = vae.encoder.conv_out.bias
        last[channels:] = -6.0  # the posterior's log variance
    return vae


def begin_as(vae: Any, other: Any) -> None:
    """Copy what two autoencoders have in common."""
    own = vae.state_dict()
    shared = {
        name: value for name, value in other.state_dict().items() if own.get(name, value).shape == value.shape
    }
    vae.load_state_dict({name: value for name, value in shared.items() if name in own}, strict=False)


def train(channels: int, steps: int, folder: Path, report: Report, device: str, start: Any = None) -> Any:
    """A trained autoencoder whose config says how large its latents are."""
    vae = make(channels)
    if start is not None:
        begin_as(vae, start)

    def loss(draw: Draw) -> Tensor:
        pictures = to_pixels(_pictures(draw), device)
        posterior = vae.encode(pictures).latent_dist
        seen = vae.decode(posterior.sample(draw.torch)).sample
        error = seen - pictures
        kl = posterior.kl().mean() / pictures[0].numel()
        lost: Tensor = (error**2).mean() + 0.1 * error.abs().mean() + _KL * kl
        return lost

    job = Job(f"vae{channels}", vae, loss, steps, muon=0.03, adam=3e-3)
    trained: Any = fit(job, folder, report, device)
    _measure(trained, device)
    return trained


def to_pixels(pictures: Any, device: str = "cpu") -> Tensor:
    """[n, side, side, 3] of bytes → [n, 3, side, side] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae: Any, pictures: Any, device: str = "cpu") -> Tensor:
    """Latents as a denoiser sees them: shifted and scaled, [n, channels, side/8, side/8]."""
    parts = []
    for at in range(0, len(pictures), 16):
        parts.append(vae.encode(to_pixels(pictures[at : at + 16], device)).latent_dist.mode())
    latents: Tensor = (torch.cat(parts) - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    return latents


def _pictures(draw: Draw) -> Any:
    rng = draw.numpy
    whole = draw.share > _WHOLE
    found = []
    for _ in range(4 if whole else 8):
        kind = rng.random()
        scene = world.scene(rng).styled(str(rng.choice(world.STYLES)) if kind > 0.5 else "plain")
        picture = world.draw(scene)
        if kind < 0.15:
            picture = _edges(picture)
        elif kind < 0.25:  # any colours
            picture = _recoloured(picture, rng)
        if not whole:
            top, left = rng.integers(0, world.SIDE_PX - _PART_PX + 1, 2)
            picture = picture[top : top + _PART_PX, left : left + _PART_PX]
        found.append(picture)
    return np.stack(found)


def _edges(picture: world.Pixels) -> world.Pixels:
    return np.asarray(canny(Image.fromarray(picture)))


def _recoloured(picture: world.Pixels, rng: np.random.Generator) -> world.Pixels:
    ends = rng.integers(0, 256, (2, 3))
    share = picture.mean(axis=2, keepdims=True) / 255
    return np.asarray(ends[0] + share * (ends[1] - ends[0]), np.uint8)


@torch.no_grad()
def _measure(vae: Any, device: str) -> None:
    """Write the latents' mean and spread into the config, so that denoisers see numbers of about 1."""
    rng = np.random.default_rng(0)
    pictures = np.stack([world.draw(world.scene(rng)) for _ in range(48)])
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = encode(vae, pictures, device)
    sixteen = vae.config.latent_channels == 16
    shift = float(latents.mean()) if sixteen else 0.0
    vae.register_to_config(
        shift_factor=shift if sixteen else None,
        scaling_factor=1 / float((latents - shift).pow(2).mean().sqrt()),
    )


@torch.no_grad()
def psnr(vae: Any, pictures: Any, device: str = "cpu") -> float:
    pixels = to_pixels(pictures, device)
    seen = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10(((seen - pixels) / 2).pow(2).mean()))
