"""Norm weights of a batch's own: row by row in place of the module's, which stays as it was loaded.

Some adapters, such as control LoRAs, replace the weights of norms instead of adding to them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import rms_norm

Overrides = Mapping[str, Tensor]  # a norm's weight [size] by the norm's name


class Norms:
    """Stands beside some norms over the last axis of [rows, …, size]; rows that override none pay nothing.

    `rows` may be called only by the thread that runs the modules.
    """

    def __init__(self, modules: Mapping[str, nn.RMSNorm]) -> None:
        self._modules = modules

    def placed(self, overrides: Overrides) -> Overrides:
        """The weights as the modules hold theirs: same device, same dtype. `rows` takes them as they are."""
        return {name: weight.to(self._modules[name].weight) for name, weight in overrides.items()}

    @contextmanager
    def rows(self, overrides: Sequence[Overrides]) -> Iterator[None]:
        """In the forwards inside, row r has the weights `overrides[r]` where it names a norm.

        Only there the modules have hooks: torch.compile does not look for hooks that come later.
        """
        active: dict[str, dict[int, Tensor]] = {}
        for row, given in enumerate(overrides):
            for name, weight in self.placed(given).items():
                active.setdefault(name, {})[row] = weight
        with ExitStack() as hooks:
            for name, weights in active.items():
                handle = self._modules[name].register_forward_hook(partial(_replace, weights))
                hooks.callback(handle.remove)
            yield


def _replace(
    weights: Mapping[int, Tensor], module: nn.RMSNorm, inputs: tuple[Any, ...], output: Tensor
) -> None:
    for row, weight in weights.items():
        output[row] = rms_norm(inputs[0][row], module.normalized_shape, weight, module.eps)
