"""Whole forwards as CUDA graphs: one call replays what the CPU would have launched piece by piece.

A graph reads and writes fixed places, so its inputs are copied in and its output out. It is captured at the
start, when no other thread works on the device, and kept only where it is faster.
"""

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pipelines.speed.clock import seconds

logger = logging.getLogger(__name__)

Inputs = Any  # tensors in dicts, lists and tuples, and what is no tensor and stays the same for a key
LONG_S = 0.2  # of a forward that keeps the GPU busy whatever the CPU does
WORTH = 0.98  # a graph is kept if it takes at most so much of the time


class Captures:
    """The captured forwards of one model, by keys that say all that a forward's graph depends on.

    `replay` may be called by one thread at a time, the same as runs the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[Hashable, _Captured] = {}
        self._pool: Any = None  # they replay one after another, and share their memory

    def __contains__(self, key: Hashable) -> bool:
        return key in self._captured

    def __len__(self) -> int:
        return len(self._captured)

    def capture(self, key: Hashable, forward: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
        """Capture `forward(inputs)`, which has run before; not where it gains nothing or there is no GPU."""
        if self._device.type != "cuda":
            return
        usual = seconds(lambda: forward(inputs), self._device)
        if usual > LONG_S:
            return
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        captured = _Captured(forward, inputs, self._pool, self._device)
        replayed = seconds(lambda: captured.replay(inputs), self._device)
        logger.info("forward %s: %.2f ms, captured %.2f ms", key, usual * 1e3, replayed * 1e3)
        if replayed <= WORTH * usual:
            self._captured[key] = captured

    def replay(self, key: Hashable, inputs: Inputs) -> Tensor:
        """The forward's output, a tensor of its own."""
        return self._captured[key].replay(inputs)


class _Captured:
    def __init__(
        self, forward: Callable[[Inputs], Tensor], inputs: Inputs, pool: Any, device: torch.device
    ) -> None:
        self._inputs = tree_map_only(Tensor, Tensor.clone, inputs)
        self._places = [each for each in tree_leaves(self._inputs) if isinstance(each, Tensor)]
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # what is set up at the first call must not be captured
            for _ in range(3):
                forward(self._inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # other threads may touch the device, although none should
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = forward(self._inputs)

    def replay(self, inputs: Inputs) -> Tensor:
        given = [each for each in tree_leaves(inputs) if isinstance(each, Tensor)]
        for place, each in zip(self._places, given, strict=True):
            place.copy_(each)
        self._graph.replay()
        return self._output.clone()
