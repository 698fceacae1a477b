"""FLUX's sampling maths as pure functions.

Notation: sigma runs from 1 (noise) to 0 (picture); x = (1 - sigma)·z + sigma·noise; the transformer
predicts the velocity v = noise - z (rectified flow, Esser et al. 2024, arXiv 2403.03206).
Latents are packed into tokens: 16 channels × 2 × 2 pixels of the VAE's grid become 64 channels.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

LATENT_CHANNELS = 16
PIXELS_PER_TOKEN = 16  # 8 by the VAE, 2 by packing


@dataclass(frozen=True, slots=True)
class Grid:
    """A picture's size in tokens."""

    rows: int
    columns: int

    @classmethod
    def of(cls, width: int, height: int) -> "Grid":
        """The largest grid inside width × height pixels, at least one token each way."""
        return cls(max(1, height // PIXELS_PER_TOKEN), max(1, width // PIXELS_PER_TOKEN))

    @classmethod
    def within(cls, width: int, height: int, max_pixels: int) -> "Grid":
        """As `of`, shrunk in proportion where that is more than `max_pixels`."""
        shrink = min(1.0, math.sqrt(max_pixels / (width * height)))
        return cls.of(int(width * shrink), int(height * shrink))

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def width(self) -> int:
        """Pixels."""
        return self.columns * PIXELS_PER_TOKEN

    @property
    def height(self) -> int:
        """Pixels."""
        return self.rows * PIXELS_PER_TOKEN


def draw_noise(grid: Grid, seed: int) -> Tensor:
    """Packed noise [tokens, 64] in float32 from a CPU generator of its own.

    The numbers are those that diffusers draws for a batch of one, so the same seed gives the same
    start there and here, wherever the picture stands in a batch and on whatever device it is made.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, LATENT_CHANNELS, 2 * grid.rows, 2 * grid.columns)
    return pack(torch.randn(shape, generator=generator)[0])


def pack(latents: Tensor) -> Tensor:
    """[channels, 2·rows, 2·columns] → [rows·columns, 4·channels]."""
    channels, height, width = latents.shape
    tiles = latents.view(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
    return tiles.reshape((height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, grid: Grid) -> Tensor:
    """[rows·columns, 4·channels] → [channels, 2·rows, 2·columns]."""
    channels = tokens.shape[-1] // 4
    tiles = tokens.view(grid.rows, grid.columns, channels, 2, 2).permute(2, 0, 3, 1, 4)
    return tiles.reshape(channels, 2 * grid.rows, 2 * grid.columns)


def image_ids(grid: Grid) -> Tensor:
    """Position ids [tokens, 3]: a zero, the row, the column."""
    ids = torch.zeros(grid.rows, grid.columns, 3)
    ids[..., 1] += torch.arange(grid.rows)[:, None]
    ids[..., 2] += torch.arange(grid.columns)[None, :]
    return ids.view(grid.tokens, 3)


@dataclass(frozen=True, slots=True)
class Shift:
    """How far the schedule moves towards noise, by the picture's size.

    The exponent is linear in tokens: `base` at `base_tokens`, `max` at `max_tokens`.
    """

    base: float = 0.5
    max: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096

    def mu(self, tokens: int) -> float:
        slope = (self.max - self.base) / (self.max_tokens - self.base_tokens)
        return self.base + slope * (tokens - self.base_tokens)


Spacing = Literal["even", "sgm_uniform", "beta"]

# The least sigma of FLUX before shifting, by which ComfyUI ends its sgm_uniform: one of 10,000 timesteps.
SIGMA_MIN = 1e-4
BETA = 0.6  # both parameters of the distribution (arXiv 2407.12173), as in diffusers and ComfyUI


def schedule(steps: int, mu: float | None, spacing: Spacing = "even") -> tuple[float, ...]:
    """`steps` + 1 sigmas from 1 down to 0: spaced, shifted towards noise, then the end.

    sigma' = e^mu / (e^mu + 1/sigma - 1). None leaves them unshifted (FLUX.1 [schnell]).
    even: down to 1/steps. sgm_uniform: steps + 1 points down to SIGMA_MIN, the last one dropped.
    beta: quantiles of Beta(0.6, 0.6) between the ends of the even ones, dense at both.
    """
    least = SIGMA_MIN if spacing == "sgm_uniform" else 0
    even = [1 - (1 - least) * step / steps for step in range(steps)]
    shifted = even if mu is None else [math.exp(mu) / (math.exp(mu) + (1 / sigma - 1)) for sigma in even]
    return (*(_beta(shifted) if spacing == "beta" else shifted), 0.0)


def _beta(sigmas: list[float]) -> list[float]:
    """As many sigmas between the same ends, at even quantiles of the beta distribution."""
    first, last = sigmas[0], sigmas[-1]
    quantiles = np.linspace(1, 0, len(sigmas)) if len(sigmas) > 1 else np.ones(1)
    return [last + (first - last) * float(each) for each in betaincinv(BETA, BETA, quantiles)]


def euler(latents: Tensor, velocity: Tensor, sigma: float, following: float) -> Tensor:
    """One Euler step of the probability flow from `sigma` to `following`."""
    return latents + (following - sigma) * velocity


def dpmpp_2m(
    latents: Tensor,
    denoised: Tensor,
    previous: Tensor | None,
    sigmas: tuple[float, float, float],
) -> Tensor:
    """One step of DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) with lambda = -ln sigma.

    `denoised` is the estimate here and `previous` that of the step before, None for the first;
    `sigmas` are those of the step before, of here, and of where the step leads. The first step and one
    to 0 are Euler's.
    """
    before, sigma, following = sigmas
    target = denoised
    if previous is not None and following > 0:
        ratio = math.log(before / sigma) / math.log(sigma / following)
        target = denoised + (denoised - previous) / (2 * ratio)
    return target + (following / sigma) * (latents - target)


def noised(picture: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The state at `sigma` on the straight path from a picture to noise."""
    return (1 - sigma) * picture + sigma * noise


def remaining(sigmas: tuple[float, ...], strength: float) -> tuple[float, ...]:
    """The end of a schedule that `strength` (0 … 1] leaves: at least one step, all of them at 1."""
    steps = len(sigmas) - 1
    return sigmas[int(steps - steps * strength) :]


def denoised(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The picture that the model sees from here: z = x - sigma·v."""
    return latents - sigma * velocity


# RF inversion (arXiv 2410.10792): between a picture z and noise, two fields are mixed, the model's own
# and the straight way to where one wants to arrive.


def drawn_to_noise(latents: Tensor, velocity: Tensor, noise: Tensor, sigma: float, gamma: float) -> Tensor:
    """The field of the inversion (algorithm 1): the model's at gamma 0, straight to `noise` at 1."""
    return velocity + gamma * ((noise - latents) / (1 - sigma) - velocity)


def drawn_to_picture(latents: Tensor, velocity: Tensor, picture: Tensor, sigma: float, eta: float) -> Tensor:
    """The field of the reverse pass (algorithm 2) as a velocity: straight from `picture` at eta 1."""
    return velocity + eta * ((latents - picture) / sigma - velocity)


Shape = Literal["constant", "linear_increase", "linear_decrease"]


def etas(steps: int, eta: float, start: int, end: int, shape: Shape) -> tuple[float, ...]:
    """Eta at each step: 0 outside [start, end), inside constant or linear between 0 and `eta`."""
    last = min(end, steps) - 1
    return tuple(
        eta * _slope(step - start, last - start, shape) if start <= step <= last else 0.0
        for step in range(steps)
    )


def _slope(index: int, last: int, shape: Shape) -> float:
    """The part of eta that the step `index` of 0 … `last` gets; all of it where there is one step only."""
    if shape == "constant" or last == 0:
        return 1.0
    return index / last if shape == "linear_increase" else 1 - index / last
