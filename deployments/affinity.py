"""Which replica would have a request's picture first: that which holds its weights, unless it is too busy.

Pure. A replica is judged by seconds: what it would take to load what it lacks, and what it has to do
before. So a base model of gigabytes keeps its home through a queue, a small LoRA hardly, and a hot one
comes to lie on several replicas.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Tier(StrEnum):
    """Where a replica holds weights."""

    DEVICE = "device"
    RAM = "ram"
    DISK = "disk"


# A byte's way to the device. What is nowhere comes over the network.
SECONDS_PER_BYTE = {Tier.DEVICE: 0.0, Tier.RAM: 1 / 10e9, Tier.DISK: 1 / 1e9, None: 1 / 100e6}
USUAL_BYTES = 200_000_000  # of weights that no replica knows yet


@dataclass(frozen=True, slots=True)
class Holding:
    """Weights that a replica holds."""

    tier: Tier
    nbytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of a replica."""

    name: str
    running: int = 0  # requests that it has
    seconds: float = 1.0  # compute seconds of a request, see `meter`
    holds: Mapping[str, Holding] = field(default_factory=dict)  # by the names that needs have


def rank(replicas: Sequence[Load], needs: Collection[str]) -> list[str]:
    """The replicas' names, the one that would be done first in front.

    Equal ones come in an order that the needs decide, so that different needs have different homes.
    """
    sizes = {need: _nbytes(replicas, need) for need in needs}

    def judged(replica: Load) -> tuple[float, bytes]:
        return _delay(replica, sizes), _draw(replica.name, needs)

    return [replica.name for replica in sorted(replicas, key=judged)]


def _delay(replica: Load, sizes: Mapping[str, int]) -> float:
    """Seconds that the request would take longer there than on an idle replica that holds its weights.

    Those that run side by side share the replica, and on the mean they are half done. What a batch gains
    is in their compute seconds.
    """
    loading = sum(
        nbytes * SECONDS_PER_BYTE[held.tier if (held := replica.holds.get(need)) else None]
        for need, nbytes in sizes.items()
    )
    return loading + replica.seconds * replica.running / 2


def _nbytes(replicas: Sequence[Load], need: str) -> int:
    known = [replica.holds[need].nbytes for replica in replicas if need in replica.holds]
    return max(known, default=USUAL_BYTES)


def _draw(name: str, needs: Collection[str]) -> bytes:
    """Rendezvous hashing: each set of needs draws the replicas in an order of its own."""
    return hashlib.sha256("\n".join([name, *sorted(needs)]).encode()).digest()
