"""A sample: one image under way, from noise to finished latents."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Advanced(NamedTuple):
    """What one step gives."""

    latents: Tensor  # the next state, same shape as before
    denoised: Tensor  # the model's estimate of the finished latents, for previews


class Plan(ABC):
    """The steps of one image: what each needs of the model, and how the answer moves the latents.

    A family writes its own. Inversion steps are steps like any other, so the engine needs no
    special case for them.
    """

    steps: int  # how many there are, at least 1
    cost: int  # image tokens that one row adds to a forward
    key: Hashable  # equal keys may share a forward: resident weights, latent grid, text length

    @abstractmethod
    def advance(self, step: int, latents: Tensor, prediction: Tensor) -> Advanced:
        """Apply the model's prediction at `step` (0 … steps-1). Changes nothing in place."""


@dataclass(slots=True, eq=False)
class Sample:
    """State under way, owned by the engine between `add` and the end of its last step."""

    name: str  # request id and image number, for logs
    plan: Plan
    latents: Tensor  # float32, on the model's device
    step: int = 0  # steps done
    denoised: Tensor | None = None
    last_turn: int = -1  # the engine's turn that stepped it last; -1 before the first

    @property
    def is_done(self) -> bool:
        return self.step >= self.plan.steps

    def accept(self, advanced: Advanced) -> None:
        """Move one step on."""
        self.latents, self.denoised = advanced
        self.step += 1
