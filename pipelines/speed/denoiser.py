"""A transformer or UNet of diffusers, run in the quickest way that gives what it would give by itself."""

import logging
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.adapters.bank import LoraBank, LoraUse, stage_widths
from pipelines.speed.captures import Captures
from pipelines.speed.regions import Regions, graphs, watched
from schemas.settings import SpeedSettings

logger = logging.getLogger(__name__)


class Denoiser:
    """`module` and the LoRAs in `bank`, called inside `steered` or `staging`, which say how it runs.

    Its blocks of the classes `kinds` are compiled where the settings say so. Forwards that ask for what
    graphs do not know (`is_usual` false) run as diffusers wrote them. Used by one thread.
    """

    def __init__(self, module: Any, bank: LoraBank, kinds: tuple[str, ...], speed: SpeedSettings) -> None:
        self._module = module
        self._bank = bank
        self._device: torch.device = module.device
        self._regions = Regions(module, kinds) if speed.compile == "regional" else None
        self._captures = Captures(self._device)
        self._takes_graphs = speed.graphs == "auto"
        self._width = 0  # of the stage in the forward under way
        self._is_fast = False

    @property
    def is_compiled(self) -> bool:
        return self._regions is not None

    @property
    def captured(self) -> int:
        """How many shapes of forwards are captured."""
        return len(self._captures)

    @contextmanager
    def steered(self, loras: Sequence[Sequence[LoraUse]], *, is_usual: bool) -> Iterator[None]:
        """The forwards inside have these LoRAs, row by row."""
        self._is_fast = self._regions is not None and is_usual and self._bank.can_stage(loras)
        told = watched(type(self._module).__name__) if self._is_fast else nullcontext()
        with self._bank.rows(loras, staged=self._is_fast), self._entered(), told:
            yield

    @contextmanager
    def staging(self, rows: int, width: int) -> Iterator[None]:
        """The forwards inside are as compiled ones with LoRAs of so many ranks together."""
        self._is_fast = self._regions is not None
        with self._bank.staging(rows, width), self._entered():
            yield

    @contextmanager
    def _entered(self) -> Iterator[None]:
        staged = self._bank.staged
        self._width = 0 if staged is None else staged.shape[1]
        compiled = self._regions.compiled() if self._is_fast and self._regions else nullcontext()
        with compiled:
            yield

    def __call__(self, inputs: Mapping[str, Any], key: Hashable = None) -> Tensor:
        """The module's first output. `key` says the shapes; None where the forward was not captured."""
        if key is not None and self._is_fast and (key, self._width) in self._captures:
            return self._captures.replay((key, self._width), inputs)
        return self._forward(inputs)

    def capture(self, inputs: Mapping[str, Any], key: Hashable) -> None:
        """Capture this forward if that makes it faster; what it needs is compiled by then."""
        if self._is_fast and self._takes_graphs:
            self._captures.capture((key, self._width), self._forward, inputs)

    def _forward(self, inputs: Mapping[str, Any]) -> Tensor:
        output: Tensor = self._module(**inputs, return_dict=False)[0]
        return output

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the stage, without LoRAs first."""
        return (0, *stage_widths(self._bank.rank)) if self._bank.is_staged else (0,)


LEAST_TOKENS = 16  # of a picture, 64 × 64 pixels


def staged_rows(speed: SpeedSettings, batch_tokens: int) -> int:
    """For how many rows a bank needs a stage: as many as a forward may have; none without compiling."""
    return max(1, batch_tokens // LEAST_TOKENS) if speed.compile == "regional" else 0


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say how long a warm-up took, and for how many graphs."""
    began, before = time.monotonic(), graphs()
    yield
    logger.info("%s is warm after %.1f s, with %d graphs", what, time.monotonic() - began, graphs() - before)


def channels_last(module: nn.Module) -> None:
    """Put the convolutions' weights into the order that GPUs like."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
