"""The plan of a FLUX sample: legs of steps, each with what its rows ask of the transformer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from pipelines.adapters.bank import LoraUse
from pipelines.engine.sample import Advanced, Plan
from pipelines.flux.attention import KeyValues
from pipelines.flux.controlnet import ControlUse
from pipelines.flux.easycontrol import Condition
from pipelines.flux.sampling import (
    Grid,
    denoised,
    dpmpp_2m,
    drawn_to_noise,
    drawn_to_picture,
    euler,
    noised,
)
from pipelines.timed import Timed

Sampler = Literal["euler", "dpmpp_2m"]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a text, and pictures beside it, say to the transformer."""

    tokens: Tensor  # [length, width of T5], the model's dtype
    pooled: Tensor  # [width of CLIP]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.pooled.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Adapters:
    """What changes the transformer's weights for a row.

    The bank holds `loras` until the sample is done. `norms` stand in for norm weights, by their paths.
    """

    loras: tuple[LoraUse, ...] = ()
    norms: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """A picture that a row's attention looks at, and the noise that it is seen through: [tokens, 64]."""

    picture: Tensor
    noise: Tensor
    strength: float

    def at(self, sigma: float) -> Tensor:
        return noised(self.picture, self.noise, sigma)


@dataclass(slots=True, eq=False)
class Attended:
    """An EasyControl condition; its keys and values come with the first forward that needs them."""

    condition: Condition
    key_values: KeyValues | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What one row of a forward asks of the transformer."""

    sigma: float
    conditioning: Conditioning
    guidance: float
    adapters: Adapters
    embedding: Tensor | None = None  # [tokens, width], what control LoRAs add to the embedded latents
    controls: tuple[ControlUse, ...] = ()
    conditions: tuple[Attended, ...] = ()
    reference: Reference | None = None
    reuse: float | None = None  # an earlier step's blocks, where the first changed by less; None: never


@dataclass(frozen=True, slots=True, eq=False)
class Guides:
    """What steers a denoising besides its text."""

    embedding: Tensor | None = None
    controls: tuple[Timed[ControlUse], ...] = ()
    conditions: tuple[Attended, ...] = ()
    reference: Timed[Reference] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Pull:
    """How strongly each step is drawn to a picture [tokens, 64]."""

    picture: Tensor
    etas: Sequence[float]  # one a step


class Leg(ABC):
    """Some steps in a row. A leg's steps count from 0."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many there are, at least 1."""

    @abstractmethod
    def row(self, step: int) -> Row:
        """What the step asks of the transformer."""

    @abstractmethod
    def advance(self, step: int, latents: Tensor, velocity: Tensor, previous: Tensor | None) -> Advanced:
        """As Plan.advance; `previous` is None at the leg's first step."""


@dataclass(frozen=True, eq=False)
class Denoising(Leg):
    """From noise to a picture along `sigmas`: steps + 1 of them, falling, the last one 0.

    With `zero_init` the first step stands still (CFG-Zero*, arXiv 2503.18886, whose other half needs
    an unconditional pass).
    """

    conditioning: Conditioning
    sigmas: tuple[float, ...]
    guidance: float
    adapters: Adapters = Adapters()
    guides: Guides = Guides()
    pull: Pull | None = None
    sampler: Sampler = "euler"
    zero_init: bool = False
    reuse: float | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def row(self, step: int) -> Row:
        guides, reference = self.guides, self.guides.reference
        return Row(
            self.sigmas[step],
            self.conditioning,
            self.guidance,
            self.adapters,
            guides.embedding,
            tuple(each.what for each in guides.controls if each.holds(step, self.steps)),
            guides.conditions,
            reference.what if reference and reference.has_begun(step, self.steps) else None,
            self.reuse,
        )

    def advance(self, step: int, latents: Tensor, velocity: Tensor, previous: Tensor | None) -> Advanced:
        sigma, following = self.sigmas[step], self.sigmas[step + 1]
        field = self._field(step, latents, velocity)
        seen = denoised(latents, field, sigma)
        if self.sampler == "euler":
            return Advanced(euler(latents, field, sigma, following), seen)
        if step <= self._first_moving:  # what stood still tells nothing of the way
            previous = None
        before = self.sigmas[max(0, step - 1)]
        return Advanced(dpmpp_2m(latents, seen, previous, (before, sigma, following)), seen)

    @property
    def _first_moving(self) -> int:
        return 1 if self.zero_init else 0

    def _field(self, step: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """The velocity that the step follows."""
        if step < self._first_moving:
            velocity = velocity * 0
        if self.pull is None or self.pull.etas[step] == 0:
            return velocity
        return drawn_to_picture(latents, velocity, self.pull.picture, self.sigmas[step], self.pull.etas[step])


@dataclass(frozen=True, eq=False)
class Inversion(Leg):
    """From a picture to the structured noise that it would come from, by Euler steps along `sigmas`.

    `sigmas` are steps + 1, rising from 0 to 1. `gamma` draws the way to `noise` [tokens, 64].
    `keep` is given the structured noise; it is called on the engine's thread.
    """

    conditioning: Conditioning
    sigmas: tuple[float, ...]
    guidance: float
    adapters: Adapters
    noise: Tensor
    gamma: float
    keep: Callable[[Tensor], None]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def row(self, step: int) -> Row:
        return Row(self.sigmas[step], self.conditioning, self.guidance, self.adapters)

    def advance(self, step: int, latents: Tensor, velocity: Tensor, previous: Tensor | None) -> Advanced:
        sigma, following = self.sigmas[step], self.sigmas[step + 1]
        field = drawn_to_noise(latents, velocity, self.noise, sigma, self.gamma)
        ahead = euler(latents, field, sigma, following)
        if step == self.steps - 1:
            self.keep(ahead)
        return Advanced(ahead, denoised(latents, velocity, sigma))


class FluxPlan(Plan):
    """Legs, one after the other, on one grid."""

    def __init__(self, grid: Grid, *legs: Leg) -> None:
        self.grid = grid
        self._legs = legs
        self.steps = sum(leg.steps for leg in legs)

    def row(self, step: int) -> Row:
        leg, step = self._leg(step)
        return leg.row(step)

    def key(self, step: int) -> Hashable:
        return self.grid, len(self.row(step).conditioning.tokens)

    def cost(self, step: int) -> int:
        return self.grid.tokens * (2 if self.row(step).reference else 1)

    def advance(self, step: int, latents: Tensor, prediction: Tensor, previous: Tensor | None) -> Advanced:
        leg, step = self._leg(step)
        return leg.advance(step, latents, prediction, previous if step else None)

    def _leg(self, step: int) -> tuple[Leg, int]:
        """The leg of a step of the plan, and the step's number in it."""
        for leg in self._legs:
            if step < leg.steps:
                return leg, step
            step -= leg.steps
        raise AssertionError("the plan has no such step")
