"""Which samples share the next forward pass. Pure: no torch, no threads, no time but the work given out."""

from collections.abc import Sequence

from pipelines.engine.pace import Pace
from pipelines.engine.sample import Sample
from schemas.jobs import Priority

PATIENCE = {Priority.NORMAL: 1.0, Priority.LOW: 8.0}  # by a sample's own work


class Batcher:
    """Gives out forwards by due times, on a clock that counts the work given out so far.

    A sample is due at `came` + patience × rest: what the clock said when it came, and the work of the steps
    that it still has to do, alone. Whoever is due first leads; samples of its key join it in the same
    order, as long as they gain and fit.

    - Of equals the first runs to its end: where rows gain nothing, taking turns makes everybody late.
    - A long picture stands back for shorter ones, between two steps, for as long as it takes itself, one of
      low priority for eight times as long. One that is nearly done stands back for nobody.
    - Nothing starves. Whoever comes when the clock has reached a sample's due time is due later, so from
      then on only those go first who were there: at most as many turns as they have steps.
    """

    def __init__(self, pace: Pace | None = None) -> None:
        self._pace = pace or Pace()
        self.clock = 0.0

    def admit(self, sample: Sample, priority: Priority) -> None:
        """A sample comes, before it is first given to `choose`."""
        sample.came, sample.patience = self.clock, PATIENCE[priority]

    def due(self, sample: Sample) -> float:
        steps = sample.plan.steps - sample.step
        return sample.came + sample.patience * steps * self._pace.work(sample.cost, sample.cost)

    def choose(self, samples: Sequence[Sample], budget: int) -> list[Sample]:
        """The next batch out of the samples under way; both are in the order of their coming.

        Its rows cost at most `budget` image tokens; one sample always fits.
        """
        first, *others = sorted(samples, key=self.due)  # stable: who came first breaks ties
        most = min(budget, self._pace.worth(first.cost))
        batch, cost = {first}, first.cost
        for sample in others:
            if sample.key == first.key and cost + sample.cost <= most:
                batch.add(sample)
                cost += sample.cost
        self.clock += self._pace.work(first.cost, cost)
        return [sample for sample in samples if sample in batch]
