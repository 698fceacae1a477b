"""After the last step: pictures of requests that end together are decoded together."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from pipelines.base import AnyPipeline, Generation
from pipelines.engine.memory import give_back
from pipelines.engine.sample import Sample

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Waiting:
    """A generation before its end. `pixels` are those that were decoded with others'."""

    pipeline: AnyPipeline
    generation: Generation
    pixels: Mapping[Sample, Tensor] | None = None  # None: nobody has looked yet


class Decoding:
    """Where the generations of one model wait for the VAE.

    `add` and `drop` may be called from any thread, `pixels` from one.
    """

    def __init__(self) -> None:
        self._waiting: list[Waiting] = []
        self._lock = Lock()

    def add(self, pipeline: AnyPipeline, generation: Generation) -> Waiting:
        """A generation whose last step is done. `drop` it in the end."""
        waiting = Waiting(pipeline, generation)
        with self._lock:
            self._waiting.append(waiting)
        return waiting

    def drop(self, waiting: Waiting) -> None:
        """Forget what nobody waits for any more, decoded or not."""
        with self._lock:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def pixels(self, waiting: Waiting) -> Mapping[Sample, Tensor]:
        """Those of its samples that were worth decoding with what waits beside it; alone, none."""
        if waiting.pixels is None:
            self._decode_together()
        return waiting.pixels or {}

    def _decode_together(self) -> None:
        """All that waits. What fails here, each tries again alone: one at fault fails alone."""
        with self._lock:
            together, self._waiting = self._waiting, []
        pixels = _pixels(together) if len(together) > 1 else {}
        for each in together:
            each.pixels = {sample: pixels[sample] for sample in each.generation.samples if sample in pixels}


def _pixels(together: Sequence[Waiting]) -> Mapping[Sample, Tensor]:
    """Those of samples that are worth decoding together; none if that fails."""
    samples = [sample for each in together for sample in each.generation.samples]
    sound = [sample for sample in samples if torch.isfinite(sample.latents).all()]
    try:
        pixels: Mapping[Sample, Tensor] = together[0].pipeline.model.decode_together(sound)
    except (RuntimeError, MemoryError) as error:
        logger.warning("%d pictures are decoded one by one: %s", len(samples), str(error))
    else:
        return pixels
    give_back()  # not inside of the except: there the failure's frames still hold their tensors
    return {}
