"""A model's replicas in simulated time: requests come, are routed, load adapters and share the compute.

Pure and exact: the same trace and policies give the same figures. A replica runs `slots` requests side by
side, each at its share of the replica's speed, as an engine does that gains nothing from batches. A
request's wait is what it takes beyond its own compute seconds. Adapters load beside the computing.
"""

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

TICK_S = 1.0  # how often the number of replicas is decided, and replicas tell what they hold
BUSY_S = 60.0  # how far back `busy` looks


@dataclass(frozen=True, slots=True)
class Request:
    """One call: when it comes, what it computes, and the adapter that it names."""

    at: float
    work_s: float
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Physics:
    """How the replicas are."""

    slots: int = 8
    start_s: float = 60.0
    fetch_s: float = 2.0  # an adapter from the network, the first time on a replica
    load_s: float = 0.2  # from its disk or RAM, after it was put out of its memory
    room: int = 8  # adapters in a replica's memory
    loads_one_by_one: bool = False


class Replica:
    """One replica: what it computes, loads and holds."""

    def __init__(self, name: str, physics: Physics, ready_at: float) -> None:
        self.name = name
        self.physics = physics
        self.ready_at = ready_at
        self.is_leaving = False
        self.memory: OrderedDict[str, float] = OrderedDict()  # adapter → there from; used last comes last
        self.disk: set[str] = set()
        self.here = 0  # requests, those that load included
        self.fetches = 0
        self.loads = 0
        self.done_s = 0.0  # compute seconds of the requests that ended here
        self.busy_s = 0.0  # time with a request
        self.busy = 0.0  # its share of late
        self._computing: list[tuple[float, int, Request]] = []  # by the share at which each ends
        self._share = 0.0  # compute seconds that each has had
        self._at = 0.0
        self._loader_free_at = 0.0

    def hold(self, adapter: str | None, now: float) -> float:
        """Have the adapter in memory. Returns when it is."""
        if adapter is None:
            return now
        if adapter not in self.memory:
            is_known = adapter in self.disk
            self.loads += is_known
            self.fetches += not is_known
            self.disk.add(adapter)
            began = max(now, self._loader_free_at) if self.physics.loads_one_by_one else now
            self.memory[adapter] = began + (self.physics.load_s if is_known else self.physics.fetch_s)
            self._loader_free_at = self.memory[adapter]
            if len(self.memory) > self.physics.room:
                self.memory.popitem(last=False)
        self.memory.move_to_end(adapter)
        return max(now, self.memory[adapter])

    def advance(self, now: float) -> None:
        passed, self._at = now - self._at, now
        if self._computing:
            self._share += passed / len(self._computing)
        is_busy = float(self.here > 0)
        self.busy_s += passed * is_busy
        self.busy += (is_busy - self.busy) * min(1.0, passed / BUSY_S)

    def compute(self, number: int, request: Request) -> None:
        heapq.heappush(self._computing, (self._share + request.work_s, number, request))

    def next_end(self) -> float | None:
        """When the next request ends, if nothing changes."""
        if not self._computing:
            return None
        return self._at + max(0.0, self._computing[0][0] - self._share) * len(self._computing)

    def end(self) -> tuple[int, Request]:
        _, number, request = heapq.heappop(self._computing)
        self.here -= 1
        self.done_s += request.work_s
        return number, request


@dataclass(frozen=True, slots=True)
class View:
    """What a scaling policy sees."""

    at: float
    requests: int  # that wait or run
    busy: float
    ready: int
    replicas: int  # decided last
    seconds: float  # compute seconds of a request, of late


class Scaler(Protocol):
    """How many replicas there should be, from now on."""

    def __call__(self, view: View) -> int: ...


class Router(Protocol):
    """Which of the replicas with a free place takes a request."""

    def choose(self, replicas: Sequence[Replica], request: Request, now: float) -> Replica: ...

    def tell(self, replicas: Sequence[Replica], now: float) -> None:
        """Replicas say what they hold."""


@dataclass
class Outcome:
    """What a run came to."""

    waits: list[float] = field(default_factory=list)  # of each request, in seconds
    replica_s: float = 0.0  # that replicas were there, the time they start included
    starts: int = 0  # of replicas beyond the first ones
    counts: list[tuple[float, int]] = field(default_factory=list)  # when the number decided changed
    replicas: list[Replica] = field(default_factory=list)  # all that ever were


@dataclass
class _Fleet:
    """A run under way."""

    physics: Physics
    router: Router
    now: float = 0.0
    target: int = 0
    waiting: deque[tuple[int, Request]] = field(default_factory=deque)
    replicas: list[Replica] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)
    seconds: float = 5.0
    _names: Iterable[int] = field(default_factory=itertools.count)
    _loading: list[tuple[float, int, Request, Replica]] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return len(self.waiting) + sum(each.here for each in self.replicas)

    def resize(self, target: int) -> None:
        """Start or stop replicas; those that start go first, and who is stopped ends what it has."""
        if target != self.target:
            self.outcome.counts.append((self.now, target))
        self.target = target
        staying = [each for each in self.replicas if not each.is_leaving]
        for _ in range(target - len(staying)):
            name = f"r{next(iter(self._names))}"
            ready_at = self.now + self.physics.start_s if self.now else 0.0
            self.outcome.starts += self.now > 0
            self.replicas.append(Replica(name, self.physics, ready_at))
            self.replicas[-1].advance(self.now)
            self.outcome.replicas.append(self.replicas[-1])
        for each in sorted(staying, key=lambda each: -each.ready_at)[: max(0, len(staying) - target)]:
            each.is_leaving = True
        self._part()

    def route(self) -> None:
        while self.waiting:
            free = [each for each in self.serving() if each.here < self.physics.slots]
            if not free:
                return
            number, request = self.waiting.popleft()
            replica = self.router.choose(free, request, self.now)
            replica.here += 1
            ready = replica.hold(request.adapter, self.now)
            heapq.heappush(self._loading, (ready, number, request, replica))

    def next_event(self) -> float | None:
        ends = [end for each in self.replicas if (end := each.next_end()) is not None]
        starts = [each.ready_at for each in self.replicas if each.ready_at > self.now and self.waiting]
        return min([*ends, *starts, *(at for at, *_ in self._loading[:1])], default=None)

    def advance(self, to: float) -> None:
        """Move to a time at or before the next event, and do what is due then."""
        self.outcome.replica_s += (to - self.now) * len(self.replicas)
        self.now = to
        for each in self.replicas:
            each.advance(to)
        while self._loading and self._loading[0][0] <= to:
            _, number, request, replica = heapq.heappop(self._loading)
            replica.compute(number, request)
        for each in self.replicas:
            while (end := each.next_end()) is not None and end <= to + 1e-9:
                self._end(*each.end())
        self._part()

    def _part(self) -> None:
        """Those that go are gone when they have nothing left."""
        self.replicas = [each for each in self.replicas if each.here or not each.is_leaving]

    def _end(self, number: int, request: Request) -> None:
        self.outcome.waits[number] = max(0.0, round(self.now - request.at - request.work_s, 6))
        self.seconds += 0.05 * (request.work_s - self.seconds)

    def serving(self) -> list[Replica]:
        return [each for each in self.replicas if each.ready_at <= self.now and not each.is_leaving]

    def view(self) -> View:
        serving = self.serving()
        busy = sum(each.busy for each in serving)
        return View(self.now, self.requests, busy, len(serving), self.target, self.seconds)


def run(
    trace: Sequence[Request],
    physics: Physics,
    router: Router,
    scaler: Scaler,
    *,
    replicas: int,
    watch: Callable[[View], None] = lambda view: None,
    until: float = 0.0,
) -> Outcome:
    """Play a trace, sorted by time, until all requests have ended and `until` is over.

    `replicas` are there from the start. `watch` is shown what the scaler is shown, after it decided.
    """
    fleet = _Fleet(physics, router)
    fleet.resize(replicas)
    fleet.outcome.waits = [0.0] * len(trace)
    coming = deque(enumerate(trace))
    tick = TICK_S
    while coming or fleet.requests or fleet.now < until:
        at = min([tick, *(request.at for _, request in itertools.islice(coming, 1))])
        event = fleet.next_event()
        fleet.advance(at if event is None else min(at, max(event, fleet.now)))
        while coming and coming[0][1].at <= fleet.now:
            fleet.waiting.append(coming.popleft())
        if fleet.now >= tick:
            tick += TICK_S
            router.tell(fleet.serving(), fleet.now)
            fleet.resize(scaler(fleet.view()))
            watch(fleet.view())
        fleet.route()
    return fleet.outcome
