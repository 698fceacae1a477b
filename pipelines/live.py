"""How much memory a computation holds at its peak, without doing it: on tensors that have no values."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_bytes(call: Callable[[], object], weights: Iterable[nn.Module]) -> int:
    """The most bytes that tensors made inside of `call` hold at once; `weights` are there already.

    The same on every device, "meta" included. What kernels use inside of themselves is not in it.
    """
    known = [each for module in weights for each in (*module.parameters(), *module.buffers())]
    with torch.no_grad(), _FusedAttention(), _Live(known) as live:
        call()
    peak: int = live.peak
    return peak


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors made while it is on."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(each.untyped_storage() for each in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_iter(made):
            if isinstance(each, Tensor) and (storage := each.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return made

    def _freed(self, nbytes: int) -> None:
        self._now -= nbytes


class _FusedAttention(TorchFunctionMode):
    """Attention without values as GPUs compute it: with no matrix of all tokens by all tokens."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            if query.is_meta:
                return torch.empty_like(query)
        return func(*args, **kwargs)
