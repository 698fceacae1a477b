"""What the simulations compare: our policies as they are shipped, and those beside them."""

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.simulation import Replica, Request, View
from deployments.affinity import Holding, Load, Tier, rank
from deployments.scaling import Load as Demand
from deployments.scaling import Past, Rules, decide

ADAPTER_BYTES = 200_000_000
MEMORY_S = 30.0  # as the router's


@dataclass
class Affinity:
    """Ours: `rank`, with what replicas told a second ago and what was sent there since."""

    seconds: float = 3.4  # compute seconds of a request, as replicas tell
    _told: dict[str, dict[str, Holding]] = field(default_factory=dict)
    _sent: dict[tuple[str, str], float] = field(default_factory=dict)

    def tell(self, replicas: Sequence[Replica], now: float) -> None:
        self._told = {each.name: _holds(each, now) for each in replicas}
        self._sent = {key: at for key, at in self._sent.items() if now - at < MEMORY_S}

    def choose(self, replicas: Sequence[Replica], request: Request, now: float) -> Replica:
        needs = [] if request.adapter is None else [request.adapter]
        loads = [self._load(each, needs) for each in replicas]
        first = rank(loads, needs)[0]
        for need in needs:
            self._sent[first, need] = now
        return next(each for each in replicas if each.name == first)

    def _load(self, replica: Replica, needs: Sequence[str]) -> Load:
        sent = {
            need: Holding(Tier.DEVICE, ADAPTER_BYTES) for need in needs if (replica.name, need) in self._sent
        }
        holds = sent | self._told.get(replica.name, {})
        return Load(replica.name, replica.here, self.seconds, holds)


def _holds(replica: Replica, now: float) -> dict[str, Holding]:
    """Without what is still on its way."""
    there = {name for name, at in replica.memory.items() if at <= now}
    return {
        name: Holding(Tier.DEVICE if name in there else Tier.DISK, ADAPTER_BYTES)
        for name in replica.disk
        if name in there or name not in replica.memory
    }


class PowerOfTwo:
    """Serve's default: the less busy one of two that are drawn."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def tell(self, replicas: Sequence[Replica], now: float) -> None:
        pass

    def choose(self, replicas: Sequence[Replica], request: Request, now: float) -> Replica:
        two = self._random.sample(list(replicas), min(2, len(replicas)))
        return min(two, key=lambda each: each.here)


class Multiplexed(PowerOfTwo):
    """`@serve.multiplexed`: who has the model, else who has the fewest; of these the power of two.

    Its replicas load one model at a time, and count models, not bytes. Serve waits a second or two for a
    place at who has the model; here it goes elsewhere at once.
    """

    def choose(self, replicas: Sequence[Replica], request: Request, now: float) -> Replica:
        holding = [each for each in replicas if request.adapter in each.memory]
        fewest = min(len(each.memory) for each in replicas)
        return super().choose(
            holding or [each for each in replicas if len(each.memory) == fewest], request, now
        )


class Fixed:
    """As many replicas as ever."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def __call__(self, view: View) -> int:
        return self._replicas


class ByWork:
    """Ours, within Serve's wrapper: while no replica is ready, Serve starts one and asks nobody.

    `window`: it is told of no more requests.
    """

    def __init__(self, rules: Rules, start_s: float, window: int | None = None) -> None:
        self._rules, self._start_s, self._window = rules, start_s, window
        self._past = Past()

    def __call__(self, view: View) -> int:
        if not view.ready and view.requests:
            return max(1, view.replicas)
        requests = min(view.requests, self._window or view.requests)
        load = Demand(view.at, requests, 0, view.seconds, view.busy, view.ready, view.replicas, self._start_s)
        replicas, self._past = decide(load, self._rules, self._past)
        return max(replicas, min(1, view.replicas - 1))  # Serve's wrapper: to nothing from one only


class ByRequests:
    """Serve 2.60's own policy: requests by replica, averaged, with delays that start anew.

    It sees no more requests than the dispatcher hands over: `window`.
    """

    def __init__(self, rules: Rules, target: int, window: int, up_s: float = 2.0, look_back: int = 5) -> None:
        self._rules, self._target, self._window, self._up_s = rules, target, window, up_s
        self._seen: deque[int] = deque(maxlen=look_back)
        self._since: tuple[int, float] = (0, 0.0)  # whether it would go up or down, and since when

    def __call__(self, view: View) -> int:
        self._seen.append(min(view.requests, self._window))
        requests = sum(self._seen) / len(self._seen)
        if not view.ready and requests:
            return max(1, view.replicas)
        wanted = math.ceil(requests / self._target) if view.ready else view.replicas
        direction = (wanted > view.replicas) - (wanted < view.replicas)
        if direction != self._since[0]:
            self._since = direction, view.at
        waited = view.at - self._since[1]
        down_s = self._rules.idle_s if view.replicas == 1 else self._rules.hold_s
        if direction and waited >= (self._up_s if direction > 0 else down_s):
            self._since = 0, view.at
            least = max(self._rules.least, min(1, view.replicas - 1))
            return min(self._rules.most, max(least, wanted))
        return view.replicas
