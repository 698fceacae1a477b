"""What acts in a part of the steps only."""

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Timed(Generic[T]):
    """Something, and the part of the steps that it acts in: from `start` to `end`, fractions of them."""

    what: T
    start: float = 0.0
    end: float = 1.0

    def holds(self, step: int, steps: int) -> bool:
        """Whether the whole step lies inside, as diffusers counts it for ControlNets."""
        return self.start <= step / steps and (step + 1) / steps <= self.end

    def has_begun(self, step: int, steps: int) -> bool:
        """Whether the step's beginning lies inside."""
        return self.start <= step / steps < self.end
