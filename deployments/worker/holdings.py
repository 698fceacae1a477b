"""What a replica tells the router that it holds."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from deployments.affinity import Holding, Tier
from schemas.assets import Asset

MOST = 500  # weights that are told of: those used last


class Keeper(Protocol):
    """Whoever has weights in memory."""

    def on_device(self) -> set[str]: ...
    def in_ram(self) -> set[str]: ...


class Holdings:
    """The weights that requests have named, and where they are now."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._found: OrderedDict[str, tuple[Path, int]] = OrderedDict()  # used last comes last

    def note(self, asset: Asset, path: Path) -> None:
        """A request's weights are at `path` on disk."""
        self._found[asset.digest] = path, _nbytes(path)
        self._found.move_to_end(asset.digest)
        while len(self._found) > MOST:
            self._found.popitem(last=False)

    def tier(self, asset: Asset) -> Tier | None:
        """Where a request's weights are now."""
        found = self._found.get(asset.digest)
        return self._tier(found[0], self._memory()) if found else None

    def unloaded_nbytes(self, assets: Iterable[Asset]) -> int:
        """How many bytes of these weights, of those that were found, are not on the device."""
        memory = self._memory()
        found = dict(self._found[each.digest] for each in assets if each.digest in self._found)
        return sum(nbytes for path, nbytes in found.items() if self._tier(path, memory) != Tier.DEVICE)

    def told(self) -> dict[str, Holding]:
        """By the assets' digests, what is still here."""
        memory = self._memory()
        return {
            digest: Holding(where, nbytes)
            for digest, (path, nbytes) in self._found.items()
            if (where := self._tier(path, memory))
        }

    def _memory(self) -> dict[Tier, set[str]]:
        return {Tier.DEVICE: self._keeper.on_device(), Tier.RAM: self._keeper.in_ram()}

    @staticmethod
    def _tier(path: Path, memory: Mapping[Tier, set[str]]) -> Tier | None:
        words = {str(path), path.name}
        held = next((tier for tier, names in memory.items() if words & names), None)
        return held or (Tier.DISK if path.exists() else None)


def _nbytes(path: Path) -> int:
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
