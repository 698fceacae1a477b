"""How fast a model's forwards are, by what they hold. Pure: it is measured elsewhere.

A forward of several rows gains as long as the device is not full. Beyond that, rows that join make those
that are there wait, and nothing comes of it: at 1024 × 1024 one row of FLUX fills a large GPU, at
512 × 512 it takes four.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

WORTH = 0.05  # of the seconds a row: more rows for less than that are not worth their wait


@dataclass(frozen=True, slots=True)
class Curve:
    """What forwards of one shape took: seconds by the number of samples in them, of 1 too."""

    cost: int  # image tokens of one sample
    seconds: Mapping[int, float]

    @property
    def rows(self) -> int:
        """The fewest samples in a forward that are about as quick, each, as they can be."""
        best = min(took / rows for rows, took in self.seconds.items())
        return min(rows for rows, took in self.seconds.items() if took / rows <= best * (1 + WORTH))

    def took(self, rows: float) -> float:
        """Seconds with so many samples, also where that was not measured; never less than with one."""
        known = sorted(self.seconds.items())
        for (low, before), (high, after) in pairwise(known):
            if low <= rows <= high:
                return before + (after - before) * (rows - low) / (high - low)
        nearest, took = known[-1] if rows > 1 else known[0]
        return took * max(1.0, rows / nearest)


@dataclass(frozen=True, slots=True)
class Pace:
    """What was measured, for a few shapes. The rest is taken to be like the nearest.

    Without curves a forward is taken for as long as it has image tokens, and any company for a gain.
    `rows`: samples of a forward, whatever was measured.
    """

    curves: tuple[Curve, ...] = ()
    rows: int | None = None

    def worth(self, cost: int) -> int:
        """Image tokens that a forward should hold at most whose first sample has `cost` of them."""
        if self.rows is not None:
            return self.rows * cost
        if not self.curves:
            return sys.maxsize
        nearest = self._nearest(cost)
        return max(cost, nearest.rows * nearest.cost)

    def work(self, cost: int, tokens: int) -> float:
        """What a forward of `tokens` takes whose samples have about `cost` of them: seconds, if measured."""
        if not self.curves:
            return float(tokens)
        nearest = self._nearest(cost)
        return nearest.took(tokens / nearest.cost)

    def _nearest(self, cost: int) -> Curve:
        return min(self.curves, key=lambda curve: abs(math.log(curve.cost / cost)))
