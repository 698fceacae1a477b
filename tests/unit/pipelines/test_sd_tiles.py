"""The windows of MultiDiffusion cover a picture with no more of them than needed, and join to it again."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pipelines.sd.grid import Grid, draw_noise
from pipelines.sd.tiles import Tile, blend, tiles

grids = st.builds(Grid, st.integers(8, 70), st.integers(8, 70))
sizes = st.integers(128, 600)  # pixels, as the endpoint takes them
strides = st.integers(64, 600)


def pattern(grid: Grid, scale: int = 1) -> Tensor:
    """[rows, columns] of numbers that are all different."""
    rows, columns = grid.rows * scale, grid.columns * scale
    return torch.arange(float(rows * columns)).reshape(rows, columns)


@given(grids, sizes, sizes, strides, strides)
def test_every_cell_is_seen_by_windows_of_one_size(
    grid: Grid, width: int, height: int, right: int, down: int
) -> None:
    found = tiles(grid, width, height, right, down)
    seen = torch.zeros(grid.rows, grid.columns)
    for tile in found:
        assert 0 <= tile.top <= grid.rows - tile.rows
        assert 0 <= tile.left <= grid.columns - tile.columns
        seen[tile.top : tile.top + tile.rows, tile.left : tile.left + tile.columns] += 1
    assert seen.min() >= 1
    assert {(tile.rows, tile.columns) for tile in found} == {
        (min(grid.rows, height // 8), min(grid.columns, width // 8))
    }
    assert len(set(found)) == len(found)


@given(grids, sizes, sizes, strides, strides)
def test_no_window_is_more_than_a_stride_from_the_next_and_none_could_be_spared(
    grid: Grid, width: int, height: int, right: int, down: int
) -> None:
    found = tiles(grid, width, height, right, down)
    tops = sorted({tile.top for tile in found})
    lefts = sorted({tile.left for tile in found})
    assert [(tile.top, tile.left) for tile in found] == [(top, left) for top in tops for left in lefts]
    for starts, length, stride, cells in (
        (tops, found[0].rows, down // 8, grid.rows),
        (lefts, found[0].columns, right // 8, grid.columns),
    ):
        step = min(stride, length)
        assert starts[:-1] == [step * number for number in range(len(starts) - 1)]
        assert 0 <= starts[-1] - (len(starts) - 1) * step + step <= step
        assert len(starts) == 1 or (len(starts) - 2) * step + length < cells


@given(grids, sizes, sizes, strides, strides, st.integers(0, 9))
def test_the_windows_of_a_picture_join_to_that_very_picture(
    grid: Grid, width: int, height: int, right: int, down: int, seed: int
) -> None:
    found = tiles(grid, width, height, right, down)
    whole = draw_noise(grid, seed)
    assert torch.equal(blend(found, [tile.crop(whole) for tile in found]), whole)


@given(grids, sizes, sizes, strides, strides)
def test_where_windows_overlap_the_mean_is_taken(
    grid: Grid, width: int, height: int, right: int, down: int
) -> None:
    found = tiles(grid, width, height, right, down)
    assume(len(found) > 1)
    total, count = torch.zeros(grid.rows, grid.columns), torch.zeros(grid.rows, grid.columns)
    for number, tile in enumerate(found):
        tile.crop(total).add_(number)
        tile.crop(count).add_(1)
    parts = [torch.full((tile.rows, tile.columns), float(number)) for number, tile in enumerate(found)]
    torch.testing.assert_close(blend(found, parts), total / count)


@pytest.mark.parametrize(
    ("width", "height", "stride", "expected"),
    [
        (4096, 4096, 2048, [(0, 0, 16, 24)]),  # the endpoint's defaults: one window
        (192, 128, 64, [(0, 0, 16, 24)]),  # the picture itself
        (128, 128, 64, [(0, 0, 16, 16), (0, 8, 16, 16)]),
        (
            128,
            128,
            2048,
            [(0, 0, 16, 16), (0, 8, 16, 16)],
        ),  # a stride beyond the window's size leaves nothing out
        (135, 999, 71, [(0, 0, 16, 16), (0, 8, 16, 16)]),  # what is no multiple of 8 is rounded down
        (128, 128, 8, [(0, left, 16, 16) for left in range(9)]),
        (1, 1, 1, [(top, left, 8, 8) for top in range(9) for left in range(17)]),  # 8 cells at least
        (64, 64, 64, [(top, left, 8, 8) for top in (0, 8) for left in (0, 8, 16)]),
    ],
)
def test_a_picture_of_192_by_128_pixels(
    width: int, height: int, stride: int, expected: list[tuple[int, ...]]
) -> None:
    assert list(tiles(Grid.of(192, 128), width, height, stride, stride)) == [Tile(*each) for each in expected]


def test_the_last_window_is_pushed_inside() -> None:
    assert [tile.left for tile in tiles(Grid(16, 45), 128, 128, 80, 80)] == [0, 10, 20, 29]


def test_a_single_part_is_returned_itself() -> None:
    part = torch.randn(4, 16, 24)
    assert blend(tiles(Grid(16, 24), 512, 512, 64, 64), [part]) is part


def test_a_window_shows_the_same_of_the_pixels_as_of_the_cells() -> None:
    grid = Grid(9, 12)
    cells = pattern(grid)
    pixels = cells.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]
    tile = Tile(1, 3, 8, 9)
    assert torch.equal(tile.crop(pixels, 8)[0, ::8, ::8], tile.crop(cells))
    assert tile.crop(pixels, 8).shape == (1, 64, 72)


def test_parts_are_left_as_they_were() -> None:
    found = tiles(Grid(8, 12), 64, 64, 64, 64)
    parts = [torch.zeros(4, 8, 8), torch.ones(4, 8, 8)]
    blend(found, parts)
    assert torch.equal(parts[0], torch.zeros(4, 8, 8))
    assert torch.equal(parts[1], torch.ones(4, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_blend_has_the_parts_type(dtype: torch.dtype) -> None:
    found = tiles(Grid(8, 12), 64, 64, 64, 64)
    assert blend(found, [torch.ones(8, 8, dtype=dtype)] * 2).dtype == dtype
