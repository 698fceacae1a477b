"""The plan of a Stable Diffusion sample: its way through a scheduler, and what its rows ask of the UNet."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipelines.adapters.bank import LoraUse
from pipelines.engine.sample import Advanced, Plan
from pipelines.sd.controlnet import ControlUse
from pipelines.sd.grid import Grid
from pipelines.sd.schedule import Schedule
from pipelines.sd.text import Encoding
from pipelines.timed import Timed

CELLS_PER_TOKEN = 4  # an image token of the engine's budget is 16 × 16 pixels


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What one row of a forward asks of the UNet."""

    latents: Tensor  # [4, rows, columns], as the scheduler scales them
    timestep: float
    text: Encoding
    time_ids: tuple[int, ...]  # of SDXL: original size, crop, target size
    loras: tuple[LoraUse, ...]
    controls: tuple[ControlUse, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Prompting:
    """The prompt, what it is told apart from, and how far the prediction goes beyond that.

    Classifier-free guidance (arXiv 2207.12598): at `guidance` up to 1 there is no second row.
    """

    prompt: Encoding
    negative: Encoding
    guidance: float

    @property
    def texts(self) -> tuple[Encoding, ...]:
        return (self.prompt, self.negative) if self.guidance > 1 else (self.prompt,)

    def guided(self, predictions: Sequence[Tensor]) -> Tensor:
        """One prediction out of those under each of `texts`."""
        prompted, *others = predictions
        return torch.lerp(others[0], prompted, self.guidance) if others else prompted


class SdPlan(Plan):
    """The steps of `schedule` on the base model `base`, under a prompt, LoRAs and ControlNets.

    `loras` are adapters that the base's banks hold until the sample is done.
    """

    def __init__(
        self,
        base: Any,
        grid: Grid,
        prompting: Prompting,
        schedule: Schedule,
        loras: tuple[LoraUse, ...] = (),
        controls: Sequence[Timed[ControlUse]] = (),
    ) -> None:
        self.base = base
        self.grid = grid
        self.prompting = prompting
        self.steps = schedule.steps
        self._schedule = schedule
        self._loras = loras
        self._controls = controls

    def key(self, step: int) -> Hashable:
        return id(self.base), self.grid, len(self.prompting.prompt.tokens)

    def cost(self, step: int) -> int:
        return len(self.prompting.texts) * self.grid.rows * self.grid.columns // CELLS_PER_TOKEN

    def rows(self, step: int, latents: Tensor) -> list[Row]:
        """What the step asks of the UNet: a row under each text."""
        row = Row(
            self._schedule.scaled(step, latents),
            self._schedule.timesteps[step],
            self.prompting.prompt,
            (self.grid.height, self.grid.width, 0, 0, self.grid.height, self.grid.width),
            self._loras,
            tuple(each.what for each in self._controls if each.holds(step, self.steps)),
        )
        return [replace(row, text=text) for text in self.prompting.texts]

    def advance(self, step: int, latents: Tensor, prediction: Tensor, previous: Tensor | None) -> Advanced:
        return Advanced(*self._schedule.advance(step, latents, prediction))
