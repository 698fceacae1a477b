"""ControlNets that follow a picture's edges, for both families."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, FluxControlNetModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss

from pipelines.preprocess import canny
from pipelines.zoo.training import autoencoder, flux, stable_diffusion
from pipelines.zoo.training.loop import Draw, Job, Report, fit

_LOW, _HIGH = 100, 200


def edges(pictures: Any) -> Any:
    """[n, side, side, 3] of bytes → their edges, white on black, alike."""
    lines = [np.asarray(canny(Image.fromarray(each), _LOW, _HIGH)) for each in pictures]
    return np.stack(lines)


def train_flux(
    transformer: Any,
    lesson: Callable[[], flux.Lesson],
    vae: Any,
    steps: int,
    folder: Path,
    report: Report,
    device: str,
) -> Any:
    """One that reads the autoencoder's latents of the edges, as InstantX's."""

    @cache
    def seen() -> Tensor:
        return flux.pack(autoencoder.encode(vae, edges(lesson().pictures), device))

    torch.manual_seed(9)
    net = FluxControlNetModel.from_transformer(
        transformer,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=transformer.config.attention_head_dim,
        num_attention_heads=transformer.config.num_attention_heads,
    )
    transformer.requires_grad_(False)

    def loss(draw: Draw) -> Tensor:
        each = flux.case(lesson(), draw, count=24, unsaid=0.3)
        guidance = torch.ones(len(each.sigma), device=device)
        blocks, single = flux.controls(net, each.noisy, each.sigma, each.said, guidance, seen()[each.scenes])
        predicted = flux.velocity(
            transformer,
            each.noisy,
            each.sigma,
            each.said,
            guidance,
            controlnet_block_samples=blocks,
            controlnet_single_block_samples=single,
        )
        return mse_loss(predicted, each.target)

    job = Job("flux-canny", net, loss, steps, muon=0.01, adam=1e-3, hold=0.4)
    return fit(job, folder, report, device)


def train_sd(
    unet: Any,
    lesson: Callable[[], stable_diffusion.Lesson],
    steps: int,
    folder: Path,
    report: Report,
    device: str,
    name: str,
) -> Any:
    """One that reads the edges themselves."""

    @cache
    def seen() -> Tensor:
        return autoencoder.to_pixels(edges(lesson().pictures), device) / 2 + 0.5

    torch.manual_seed(10)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 24, 32))
    unet.requires_grad_(False)

    def loss(draw: Draw) -> Tensor:
        each = stable_diffusion.case(lesson(), draw, count=24)
        added = stable_diffusion.added(lesson().kind, each.noisy, each.said)
        down, middle = net(
            each.noisy,
            each.time,
            encoder_hidden_states=each.said.tokens,
            controlnet_cond=seen()[each.scenes],
            added_cond_kwargs=added,
            return_dict=False,
        )
        predicted = stable_diffusion.predict(
            unet,
            lesson().kind,
            each.noisy,
            each.time,
            each.said,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        )
        return mse_loss(predicted, each.target)

    job = Job(name, net, loss, steps, muon=0.01, adam=1e-3, hold=0.4)
    return fit(job, folder, report, device)
