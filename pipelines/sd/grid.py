"""A picture's size in the latents of Stable Diffusion, and the noise that fills them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHANNELS = 4
PIXELS_PER_CELL = 8


@dataclass(frozen=True, slots=True)
class Grid:
    """A picture's size in cells of 8 × 8 pixels."""

    rows: int
    columns: int

    @classmethod
    def of(cls, width: int, height: int) -> "Grid":
        """The largest grid inside width × height pixels, at least 8 cells each way: a UNet halves thrice."""
        return cls(max(8, height // PIXELS_PER_CELL), max(8, width // PIXELS_PER_CELL))

    @classmethod
    def within(cls, width: int, height: int, max_pixels: int) -> "Grid":
        """As `of`, shrunk in proportion where that is more than `max_pixels`."""
        shrink = min(1.0, math.sqrt(max_pixels / (width * height)))
        return cls.of(int(width * shrink), int(height * shrink))

    @property
    def width(self) -> int:
        """Pixels."""
        return self.columns * PIXELS_PER_CELL

    @property
    def height(self) -> int:
        """Pixels."""
        return self.rows * PIXELS_PER_CELL


def draw_noise(grid: Grid, seed: int) -> Tensor:
    """Noise [4, rows, columns] in float32 from a CPU generator of its own.

    The numbers are those that diffusers draws for a batch of one, so the same seed gives the same start
    there and here.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, CHANNELS, grid.rows, grid.columns), generator=generator)[0]
