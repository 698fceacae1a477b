"""Drive an engine by hand, turn by turn, without its thread."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pipelines.engine.engine import Engine
from pipelines.engine.sample import Sample

NOTHING = torch.zeros(0)  # the latents of samples that are only counted


@dataclass
class Ears:
    """A listener that remembers."""

    steps: list[str] = field(default_factory=list)
    ends: dict[str, BaseException | None] = field(default_factory=dict)

    def stepped(self, sample: Sample) -> None:
        self.steps.append(sample.name)

    def ended(self, sample: Sample, error: BaseException | None) -> None:
        self.ends[sample.name] = error


def turn(engine: Engine) -> None:
    with torch.inference_mode():
        engine.step()


def run_to_end(engine: Engine, samples: Sequence[Sample]) -> Ears:
    """Add the samples and take turns until none is left."""
    ears = Ears()
    for sample in samples:
        engine.add(sample, ears)
    while len(engine):
        turn(engine)
    return ears
