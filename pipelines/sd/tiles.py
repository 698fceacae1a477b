"""The windows through which MultiDiffusion (arXiv 2302.08113) sees a picture, in cells of its latents."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.sd.grid import PIXELS_PER_CELL, Grid

_LEAST_CELLS = 8  # a UNet halves thrice


@dataclass(frozen=True, slots=True)
class Tile:
    """A window into a grid, in cells."""

    top: int
    left: int
    rows: int
    columns: int

    def crop(self, tensor: Tensor, scale: int = 1) -> Tensor:
        """What the window shows of [..., height, width]: a view. `scale` is per cell: 8 for pixels."""
        top, left = self.top * scale, self.left * scale
        return tensor[..., top : top + self.rows * scale, left : left + self.columns * scale]


def tiles(grid: Grid, width: int, height: int, stride_width: int, stride_height: int) -> tuple[Tile, ...]:
    """The windows of width × height pixels, the strides apart, that cover the grid row by row.

    All have one size: at least 8 cells a side and never more than the grid has. No stride is longer than the
    window, so that nothing is left out, and the last window of a row or column is pushed inside. A picture
    no larger than the window has one: the whole grid.
    """
    rows, tops = _windows(grid.rows, height, stride_height)
    columns, lefts = _windows(grid.columns, width, stride_width)
    return tuple(Tile(top, left, rows, columns) for top in tops for left in lefts)


def _windows(cells: int, size: int, stride: int) -> tuple[int, list[int]]:
    """Along one axis: the windows' size in cells, and where each begins; `size` and `stride` are pixels."""
    length = min(cells, max(_LEAST_CELLS, size // PIXELS_PER_CELL))
    step = min(length, max(1, stride // PIXELS_PER_CELL))
    last = cells - length
    return length, [*range(0, last, step), last]


def blend(tiles: Sequence[Tile], parts: Sequence[Tensor]) -> Tensor:
    """The whole grid out of what was made of each window, averaged where windows overlap.

    `parts` are [..., rows, columns], one for each of all the windows that `tiles` gave, in that order.
    Where they agree, the average is that very value. A single part is returned itself.
    """
    assert len(tiles) == len(parts), f"each window has one part, there are {len(parts)} for {len(tiles)}"
    first, last = parts[0], tiles[-1]
    if len(parts) == 1:
        return first
    size = last.top + last.rows, last.left + last.columns
    mean = first.new_zeros(*first.shape[:-2], *size)
    seen = torch.zeros(size, dtype=first.dtype, device=first.device)
    for tile, part in zip(tiles, parts, strict=True):
        here, count = tile.crop(mean), tile.crop(seen)
        count += 1
        here += (part - here) / count
    return mean
