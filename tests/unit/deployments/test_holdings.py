"""What a replica says that it holds."""

from dataclasses import dataclass, field
from pathlib import Path

from deployments.affinity import Holding, Tier
from deployments.worker import holdings
from deployments.worker.holdings import Holdings
from schemas.assets import Asset, AssetKind


@dataclass
class Memory:
    device: set[str] = field(default_factory=set)
    ram: set[str] = field(default_factory=set)

    def on_device(self) -> set[str]:
        return self.device

    def in_ram(self) -> set[str]:
        return self.ram


def asset(source: str) -> Asset:
    return Asset(AssetKind.LORA, source)


def test_weights_are_told_of_by_the_nearest_place_that_has_them(tmp_path: Path) -> None:
    memory = Memory()
    held = Holdings(memory)
    for name in "abcd":
        (tmp_path / name).write_bytes(b"xyz")
        held.note(asset(name), tmp_path / name)
    memory.device, memory.ram = {str(tmp_path / "a"), "b"}, {"b", "c"}
    tiers = {"a": Tier.DEVICE, "b": Tier.DEVICE, "c": Tier.RAM, "d": Tier.DISK}
    assert held.told() == {asset(name).digest: Holding(tier, 3) for name, tier in tiers.items()}


def test_what_was_evicted_everywhere_is_not_told_of(tmp_path: Path) -> None:
    held = Holdings(Memory())
    path = tmp_path / "a"
    path.write_bytes(b"x")
    held.note(asset("a"), path)
    path.unlink()
    assert held.told() == {}


def test_a_folder_is_as_large_as_the_weights_in_it(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a.safetensors").write_bytes(b"12345")
    (tmp_path / "config.json").write_bytes(b"{}")
    held = Holdings(Memory())
    held.note(asset("folder"), tmp_path)
    assert held.told() == {asset("folder").digest: Holding(Tier.DISK, 5)}


def test_only_those_used_last_are_told_of(tmp_path: Path) -> None:
    held = Holdings(Memory())
    for number in range(holdings.MOST + 1):
        held.note(asset(str(number)), tmp_path)
    told = held.told()
    assert len(told) == holdings.MOST
    assert asset("0").digest not in told and asset("1").digest in told
