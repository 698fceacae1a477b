"""What a sample's latents were on their way, kept for whoever wants to look."""

from collections.abc import Mapping, Sequence

from torch import Tensor


class Trace:
    """The latents after each step, and in each of its tiles, [4, rows, columns] in float32 on the CPU.

    What a tile's latents would be is told of its own prediction, before it is averaged with others'.
    A step that is repeated is kept as it was last.
    """

    def __init__(self, *, steps: bool = False, tiles: bool = False) -> None:
        self.keeps_steps = steps
        self.keeps_tiles = tiles
        self._steps: dict[int, Tensor] = {}
        self._tiles: dict[int, tuple[Tensor, ...]] = {}

    def keep_step(self, step: int, latents: Tensor) -> None:
        self._steps[step] = latents.cpu()

    def keep_tiles(self, step: int, latents: Sequence[Tensor]) -> None:
        self._tiles[step] = tuple(each.cpu() for each in latents)

    @property
    def steps(self) -> Mapping[int, Tensor]:
        return self._steps

    @property
    def tiles(self) -> Mapping[int, Sequence[Tensor]]:
        return self._tiles
