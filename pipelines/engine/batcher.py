"""Which samples share the next forward pass. Pure: no torch, no clock."""

from collections.abc import Sequence

from pipelines.engine.sample import Sample


def choose(samples: Sequence[Sample], budget: int) -> list[Sample]:
    """The next batch out of the samples under way.

    The sample that has waited longest for a turn decides which key is served, so that no shape
    starves another; samples of the same key join it in the order of their own waiting, as long as
    the rows together cost at most `budget` image tokens. One sample always fits.
    """
    waiting = sorted(samples, key=lambda sample: sample.last_turn)  # stable: arrival breaks ties
    first, *others = waiting
    batch, cost = [first], first.cost
    for sample in others:
        if sample.key == first.key and cost + sample.cost <= budget:
            batch.append(sample)
            cost += sample.cost
    return batch
