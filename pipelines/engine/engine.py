"""The denoising loop: samples of many requests join and leave between steps.

It does not know what a prompt, an image or an endpoint is, and it never waits for anything but work.
"""

import logging
from collections.abc import Callable, Sequence
from threading import Condition, Thread
from typing import Protocol

import torch
from torch import Tensor

from pipelines.engine.batcher import Batcher
from pipelines.engine.memory import give_back, ran_out, with_room
from pipelines.engine.pace import Pace
from pipelines.engine.sample import Advanced, Sample
from schemas.jobs import Priority

logger = logging.getLogger(__name__)

GROWTH = 64  # after memory ran out, what a batch may cost grows by this fraction of itself a turn

Predict = Callable[[Sequence[Sample]], Sequence[Tensor]]
"""Samples of one key → the model's prediction for each, same order, float32."""


class Listener(Protocol):
    """Hears of a sample's way. Called on the engine's thread: must be quick and must not raise."""

    def stepped(self, sample: Sample) -> None:
        """One more step is done."""

    def ended(self, sample: Sample, error: BaseException | None) -> None:
        """The last step is done, or the sample failed. Not called for a removed sample."""


class Engine:
    """Runs `predict` over the samples added to it, one batch a turn, on a thread of its own.

    `budget` bounds a batch in image tokens, `pace` says how many gain (see Batcher); when memory runs out,
    batches become half as large, and then slowly larger again. `add` and `remove` may be called from any
    thread and take effect before the next turn.
    """

    def __init__(self, predict: Predict, budget: int, pace: Pace | None = None) -> None:
        self._predict = predict
        self._batcher = Batcher(pace)
        self._budget = self._room = budget
        self._active: dict[Sample, Listener] = {}
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the turn under way; samples not done are dropped without a word."""
        with self._changed:
            self._closed = True
            self._active.clear()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def __len__(self) -> int:
        """How many samples are under way."""
        return len(self._active)

    def add(self, sample: Sample, listener: Listener, priority: Priority = Priority.NORMAL) -> None:
        with self._changed:
            assert not self._closed, "a closed engine takes no samples"
            self._batcher.admit(sample, priority)
            self._active[sample] = listener
            self._changed.notify_all()

    def remove(self, sample: Sample) -> None:
        """Drop a sample, done or not, known or not."""
        with self._changed:
            self._active.pop(sample, None)

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait_for_work():
                self.step()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._active or self._closed)
            return not self._closed

    def step(self) -> None:
        """One turn: choose a batch, predict, advance."""
        with self._changed:
            if not self._active:
                return
            batch = self._batcher.choose(list(self._active), self._room)
        self._room = min(self._budget, self._room + 1 + self._room // GROWTH)
        for sample, outcome in zip(batch, self._outcomes(batch), strict=True):
            self._tell(sample, outcome, len(batch))

    def _outcomes(self, batch: Sequence[Sample]) -> list[Advanced | Exception]:
        """What the step gives each row. A batch that fails is run again in halves, so that a row at
        fault fails alone. No sample is changed yet."""
        try:
            return with_room(self._advanced, batch) if len(batch) == 1 else self._advanced(batch)
        except Exception as error:  # noqa: BLE001 - the top of the loop; ends up at the listener
            if len(batch) == 1:
                return [error]
            logger.warning("a batch of %d failed, running its halves: %s", len(batch), str(error))
            is_too_large = ran_out(error)
        if is_too_large:
            self._room = min(self._room, sum(sample.cost for sample in batch) // 2)
            give_back()
        half = len(batch) // 2
        return [*self._outcomes(batch[:half]), *self._outcomes(batch[half:])]

    def _advanced(self, batch: Sequence[Sample]) -> list[Advanced | Exception]:
        predictions = self._predict(batch)
        return [
            sample.plan.advance(sample.step, sample.latents, prediction, sample.denoised)
            for sample, prediction in zip(batch, predictions, strict=True)
        ]

    def _tell(self, sample: Sample, outcome: Advanced | Exception, company: int) -> None:
        listener = self._active.get(sample)
        if listener is None:  # removed while its step ran
            return
        if isinstance(outcome, Exception):
            self.remove(sample)
            listener.ended(sample, outcome)
            return
        sample.accept(outcome)
        sample.company += company
        listener.stepped(sample)
        if sample.is_done:
            self.remove(sample)
            listener.ended(sample, None)
