"""The plan of a FLUX sample: its conditioning and its sigmas."""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from pipelines.adapters.bank import LoraUse
from pipelines.engine.sample import Advanced, Plan
from pipelines.flux.sampling import Grid, denoised, euler


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a text says to the transformer."""

    tokens: Tensor  # [length, width of T5], the model's dtype
    pooled: Tensor  # [width of CLIP]


class FluxPlan(Plan):
    """Euler steps along `sigmas` (steps + 1 of them, the last one 0) under one conditioning.

    `loras` are adapters that the model's bank holds until the sample is done.
    """

    def __init__(
        self,
        grid: Grid,
        conditioning: Conditioning,
        sigmas: tuple[float, ...],
        guidance: float,
        loras: tuple[LoraUse, ...] = (),
    ) -> None:
        self.grid = grid
        self.conditioning = conditioning
        self.sigmas = sigmas
        self.guidance = guidance
        self.loras = loras
        self.steps = len(sigmas) - 1
        self.cost = grid.tokens
        self.key: Hashable = (grid, len(conditioning.tokens))

    def advance(self, step: int, latents: Tensor, prediction: Tensor) -> Advanced:
        sigma, following = self.sigmas[step], self.sigmas[step + 1]
        return Advanced(euler(latents, prediction, sigma, following), denoised(latents, prediction, sigma))
