"""FLUX's sampling maths as pure functions.

Notation: sigma runs from 1 (noise) to 0 (picture); x = (1 - sigma)·z + sigma·noise; the transformer
predicts the velocity v = noise - z (rectified flow, Esser et al. 2024, arXiv 2403.03206).
Latents are packed into tokens: 16 channels × 2 × 2 pixels of the VAE's grid become 64 channels.
"""

import math
from dataclasses import dataclass

import torch
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


def schedule(steps: int, mu: float | None) -> tuple[float, ...]:
    """`steps` + 1 sigmas from 1 down to 0: evenly spaced to 1/steps, shifted, then the end.

    sigma' = e^mu / (e^mu + 1/sigma - 1). None leaves them unshifted (FLUX.1 [schnell]).
    """
    even = [1 - step / steps for step in range(steps)]
    if mu is None:
        return (*even, 0.0)
    return (*(math.exp(mu) / (math.exp(mu) + 1 / sigma - 1) for sigma in even), 0.0)


def euler(latents: Tensor, velocity: Tensor, sigma: float, following: float) -> Tensor:
    """One Euler step of the probability flow from `sigma` to `following`."""
    return latents + (following - sigma) * velocity


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
