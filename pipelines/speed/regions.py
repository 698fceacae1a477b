"""The repeated blocks of a model, compiled by torch.compile; the few layers around them are not.

One graph serves all blocks of a class. Sizes are symbols in it: rows, tokens and the ranks of adapters may
change without another graph, but for one row, which torch treats as a case of its own. So there are few
graphs, all of which a warm-up can make; one that is made later makes a picture wait, and is told in the log.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.fx.experimental import _config as symbols

logger = logging.getLogger(__name__)

GRAPHS = 128  # of one class of blocks; beyond it torch gives up and says so

BACKEND = "inductor"  # torch.compile's; tests take one that compiles nothing


class Regions:
    """The blocks of `module` whose classes are named in `kinds`: as they are, and compiled inside `compiled`.

    Used by one thread at a time.
    """

    def __init__(self, module: nn.Module, kinds: tuple[str, ...]) -> None:
        symbols.use_duck_shape = False  # sizes that are equal once need not be so again
        self.is_compiling = False
        blocks = [each for each in module.modules() if type(each).__name__ in kinds]
        assert blocks, f"{type(module).__name__} has none of {kinds}"
        forwards = {
            kind: torch.compile(  # type: ignore[call-overload]  # its stubs lack the last two
                kind.forward,
                backend=BACKEND,
                fullgraph=True,
                dynamic=True,
                recompile_limit=GRAPHS,
                isolate_recompiles=True,
            )
            for kind in {type(block) for block in blocks}
        }
        for block in blocks:
            block.forward = partial(self._run, block, block.forward, forwards[type(block)])

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """The forwards inside run compiled; others run as they are."""
        self.is_compiling = True
        try:
            yield
        finally:
            self.is_compiling = False

    def _run(
        self, block: nn.Module, plain: Callable[..., Any], fast: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        return fast(block, *args, **kwargs) if self.is_compiling else plain(*args, **kwargs)


def graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    made: int = counters["stats"]["unique_graphs"]
    return made


@contextmanager
def watched(what: str) -> Iterator[None]:
    """Say in the log when what happens inside waits for new graphs."""
    before = graphs()
    yield
    if (made := graphs() - before) > 0:
        logger.warning("%s waited for %d graphs that the warm-up did not make", what, made)
