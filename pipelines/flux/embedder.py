"""What control LoRAs add to the embedded latents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Embedder:
    """Adds a row's own tensor to what the transformer's x_embedder gives it.

    A control LoRA widens x_embedder: it reads the latents' tokens x beside the control image's tokens c.
    Of W·[x; c] + s·up·down·[x; c] with W zero where it meets c, the part s·up·down_c·c is the same at
    every step. It is added here, so that the model is not widened and other rows know nothing of it.
    """

    def __init__(self, x_embedder: nn.Module) -> None:
        self._added: Sequence[Tensor | None] | None = None
        x_embedder.register_forward_hook(self._add)

    @contextmanager
    def rows(self, added: Sequence[Tensor | None]) -> Iterator[None]:
        """The forward inside adds `added[r]` [tokens, width] to row r, or nothing."""
        self._added = added if any(each is not None for each in added) else None
        try:
            yield
        finally:
            self._added = None

    def _add(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._added is None:
            return None
        rows = zip(output, self._added, strict=True)
        return torch.stack([row if added is None else row + added for row, added in rows])
