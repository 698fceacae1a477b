"""What a replica tells the autoscaler: how busy it is, and what a request takes of it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from schemas.jobs import Backlog

BUSY_S = 60.0  # how far back the share of busy time looks
SECONDS_S = 300.0  # and the compute seconds of a request
USUAL_S = 5.0  # of a request, before one has ended
Told = dict[str, float]


class Meter:
    """Counts the time in which there is a request here.

    Requests that run side by side share it: two that take 10 s together cost 5 compute seconds each. So
    what batching gains shows, and what it does not.
    """

    def __init__(self, start_s: float, clock: Callable[[], float] = time.time) -> None:
        """`start_s`: seconds that this replica took to start."""
        self._start_s = start_s
        self._clock = clock
        self._at = clock()
        self._running = 0
        self._busy = 0.0  # share of the time, of late
        self._busy_s = 0.0  # both of these fade alike
        self._done = 0.0
        self.seconds = USUAL_S  # compute seconds of a request, of late
        self._backlog, self._told_at = Backlog(), 0.0

    @contextmanager
    def request(self) -> Iterator[None]:
        """While a request is here."""
        self._advance()
        self._running += 1
        try:
            yield
        finally:
            self._advance()
            self._running -= 1
            self._done += 1
            self.seconds = self._busy_s / self._done

    def hear(self, backlog: Backlog) -> None:
        """What Serve does not see."""
        self._backlog, self._told_at = backlog, self._clock()

    def told(self) -> Told:
        """`busy` is a share, `busy_s` by `done` are a request's compute seconds; whose `told_at` is the
        latest knows the backlog."""
        self._advance()
        return {
            "busy": self._busy,
            "busy_s": self._busy_s,
            "done": self._done,
            "start_s": self._start_s,
            "waiting": self._backlog.waiting,
            "low": self._backlog.low,
            "told_at": self._told_at,
        }

    def _advance(self) -> None:
        """Fade what was, and add the time since the last look."""
        now = self._clock()
        passed, self._at = max(0.0, now - self._at), now
        busy = float(self._running > 0)
        self._busy = busy + (self._busy - busy) * math.exp(-passed / BUSY_S)
        kept = math.exp(-passed / SECONDS_S)
        self._busy_s = self._busy_s * kept + busy * SECONDS_S * (1 - kept)
        self._done *= kept
