"""The plan of a Stable Diffusion sample: its way through a scheduler, and what its rows ask of the UNet."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.adapters.bank import LoraUse
from pipelines.engine.sample import Advanced, Plan
from pipelines.sd.controlnet import ControlUse
from pipelines.sd.grid import PIXELS_PER_CELL, Grid
from pipelines.sd.image_attention import ImagePrompt
from pipelines.sd.schedule import Schedule
from pipelines.sd.text import Encoding
from pipelines.sd.tiles import Tile, blend
from pipelines.sd.trace import Trace
from pipelines.timed import Timed

CELLS_PER_TOKEN = 4  # an image token of the engine's budget is 16 × 16 pixels


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What one row of a forward asks of the UNet."""

    latents: Tensor  # [channels, rows, columns], as the scheduler scales them, and what is read beside them
    timestep: float
    text: Encoding
    time_ids: tuple[int, ...]  # of SDXL: original size, crop, target size
    loras: tuple[LoraUse, ...]
    controls: tuple[ControlUse, ...]
    pictures: tuple[ImagePrompt, ...]

    @property
    def cost(self) -> int:
        """Image tokens."""
        return self.latents.shape[-2] * self.latents.shape[-1] // CELLS_PER_TOKEN


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """What one of the predictions that guidance weighs is told."""

    text: Encoding
    controls: tuple[Timed[ControlUse], ...] = ()
    pictures: tuple[ImagePrompt, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Prompting:
    """The prompt, what it is told apart from, and how far the prediction goes beyond that.

    Classifier-free guidance (arXiv 2207.12598): at `guidance` up to 1 there is no second row.
    """

    prompt: Side
    negative: Side
    guidance: float

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.prompt, self.negative) if self.guidance > 1 else (self.prompt,)

    def guided(self, predictions: Sequence[Tensor]) -> Tensor:
        """One prediction out of those of each of `sides`."""
        prompted, *others = predictions
        return torch.lerp(others[0], prompted, self.guidance) if others else prompted


class SdPlan(Plan):
    """The steps of `schedule`, none without one, on the base model `base`.

    `loras` are adapters that the base's banks hold until the sample is done. `beside` is what the UNet
    reads beside the latents, [channels, rows, columns]. The picture is predicted in `tiles`, all of one
    size, by default in one; where they overlap, the scheduler steps their average.
    """

    def __init__(
        self,
        base: Any,
        grid: Grid,
        prompting: Prompting,
        schedule: Schedule | None,
        loras: tuple[LoraUse, ...] = (),
        *,
        beside: Tensor | None = None,
        tiles: Sequence[Tile] = (),
        trace: Trace | None = None,
    ) -> None:
        self.base = base
        self.grid = grid
        self.prompting = prompting
        self.steps = schedule.steps if schedule else 0
        self.tiles = tuple(tiles) or (Tile(0, 0, grid.rows, grid.columns),)
        self.trace = trace or Trace()
        self._schedule = schedule
        self._loras = loras
        self._beside = beside

    def key(self, step: int) -> Hashable:
        tile = self.tiles[0]
        return id(self.base), tile.rows, tile.columns, len(self.prompting.prompt.text.tokens)

    def cost(self, step: int) -> int:
        tile = self.tiles[0]
        rows = len(self.tiles) * len(self.prompting.sides)
        return rows * (tile.rows * tile.columns // CELLS_PER_TOKEN)

    def rows(self, step: int, latents: Tensor) -> list[Row]:
        """What the step asks of the UNet: a row for each tile and side."""
        seen = self._steps.scaled(step, latents)
        if self._beside is not None:
            seen = torch.cat([seen, self._beside])
        return [self._row(step, seen, tile, side) for tile in self.tiles for side in self.prompting.sides]

    def joined(self, step: int, latents: Tensor, predictions: Sequence[Tensor]) -> Tensor:
        """One prediction for the latents out of those for each of `rows`."""
        count = len(self.prompting.sides)
        guided = [
            self.prompting.guided(predictions[at : at + count]) for at in range(0, len(predictions), count)
        ]
        whole = blend(self.tiles, guided)
        if self.trace.keeps_tiles:
            self.trace.keep_tiles(step, self._stepped_alone(step, latents, whole, guided))
        return whole

    def advance(self, step: int, latents: Tensor, prediction: Tensor, previous: Tensor | None) -> Advanced:
        advanced = Advanced(*self._steps.advance(step, latents, prediction))
        if self.trace.keeps_steps:
            self.trace.keep_step(step, advanced.latents)
        return advanced

    @property
    def _steps(self) -> Schedule:
        assert self._schedule is not None, "nothing is to be done"
        return self._schedule

    def _row(self, step: int, seen: Tensor, tile: Tile, side: Side) -> Row:
        height, width = (PIXELS_PER_CELL * cells for cells in (tile.rows, tile.columns))
        top, left = (PIXELS_PER_CELL * cells for cells in (tile.top, tile.left))
        controls = (each.what for each in side.controls if each.holds(step, self.steps))
        return Row(
            tile.crop(seen),
            self._steps.timesteps[step],
            side.text,
            (self.grid.height, self.grid.width, top, left, height, width),
            self._loras,
            tuple(each.cropped(tile) for each in controls),
            tuple(each.cropped(tile) for each in side.pictures),
        )

    def _stepped_alone(
        self, step: int, latents: Tensor, whole: Tensor, guided: Sequence[Tensor]
    ) -> list[Tensor]:
        """Each tile's latents after the step if its own prediction counted alone there."""
        found = []
        for tile, prediction in zip(self.tiles, guided, strict=True):
            alone = whole.clone()
            tile.crop(alone).copy_(prediction)
            found.append(tile.crop(self._steps.advance(step, latents, alone)[0]))
        return found
