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

    steps: int  # how many there are; a sample with none never meets the engine

    @abstractmethod
    def key(self, step: int) -> Hashable:
        """Equal keys may share a forward at `step` (0 … steps-1): weights, latent grid, text length."""

    @abstractmethod
    def cost(self, step: int) -> int:
        """Image tokens that the sample adds to a forward at `step`."""

    @abstractmethod
    def advance(self, step: int, latents: Tensor, prediction: Tensor, previous: Tensor | None) -> Advanced:
        """Apply the model's prediction at `step`. Changes neither tensor.

        `previous` is what the step before gave as `denoised`, None at the first step.
        """


@dataclass(slots=True, eq=False)
class Sample:
    """State under way, owned by the engine between `add` and the end of its last step."""

    name: str  # request id and image number, for logs
    plan: Plan
    latents: Tensor  # float32, on the model's device
    step: int = 0  # steps done
    denoised: Tensor | None = None
    came: float = 0.0  # the batcher's clock when it was added
    patience: float = 1.0  # how long it lets others pass, by the work that it has left
    memory: object = None  # its model's own, from one step to the next
    reused: frozenset[int] = frozenset()  # the steps that took a part of their forward from an earlier one
    company: int = 0  # samples of the batches that stepped it, itself included, over all steps

    @property
    def key(self) -> Hashable:
        return self.plan.key(self.step)

    @property
    def cost(self) -> int:
        return self.plan.cost(self.step)

    @property
    def is_done(self) -> bool:
        return self.step >= self.plan.steps

    def accept(self, advanced: Advanced) -> None:
        """Move one step on."""
        self.latents, self.denoised = advanced
        self.step += 1
