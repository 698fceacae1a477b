"""How many replicas a model should have: enough that what waits begins in time, and no more.

Pure. Work is counted in compute seconds, which is what a request takes of a replica by itself: requests
of a tenth of a second and of a minute need different numbers of replicas for the same queue. Up at once,
down slowly.
"""

import math
from dataclasses import dataclass

UTILISATION = 0.8  # of a replica's time, above which a queue in front of it grows long
NOTHING = 0.05  # replicas' worth of work, which is that of a while ago


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator wants."""

    least: int  # replicas
    most: int
    target_wait_s: float  # that a request may wait for its turn
    low_target_wait_s: float  # the same of low priority
    hold_s: float  # what was needed so lately is kept
    idle_s: float  # without a request for so long, the last replica goes, where `least` is 0


@dataclass(frozen=True, slots=True)
class Load:
    """What there is to do, and who does it."""

    at: float  # seconds, by any clock
    requests: float  # that wait or run
    low: float  # of these, the ones of low priority
    seconds: float  # compute seconds of one
    busy: float  # replicas' worth of work done of late: 2.5 is two always at work and one half of the time
    ready: int  # replicas
    replicas: int  # ready or starting: what was decided last
    start_s: float  # until a new one is ready


@dataclass(frozen=True, slots=True)
class Past:
    """What a decision must remember of those before it."""

    needed: tuple[tuple[float, int], ...] = ()  # when, replicas: falling, for only the highest count
    asked_at: float | None = None  # when there was a request last


def decide(load: Load, rules: Rules, past: Past) -> tuple[int, Past]:
    """The number of replicas from now on, within the rules' bounds, and what to remember.

    More as soon as they are needed; fewer once they have not been needed for the hold, or for as long as
    a replica takes to start, lest one be stopped that never ran.
    """
    is_first = past.asked_at is None  # perhaps with many replicas that are at work
    before = ((load.at, load.replicas),) if is_first else past.needed
    needed = need(load, rules)
    since = load.at - max(rules.hold_s, load.start_s)
    held = [(at, count) for at, count in before if at > since and count > needed]
    asked_at = load.at if past.asked_at is None or load.requests > 0 else past.asked_at
    is_idle = load.requests <= 0 and load.at - asked_at >= rules.idle_s
    slowly = min(load.replicas, max((count for _, count in held), default=1))
    replicas = 0 if is_idle and load.replicas <= 1 else max(needed, slowly)
    return min(max(replicas, rules.least), rules.most), Past((*held, (load.at, needed)), asked_at)


def need(load: Load, rules: Rules) -> int:
    """Replicas that this load needs, whatever was before; at most the rules' `most`.

    Those that are there have time to spare until a new one could help. What they will have done by then
    calls for nobody; what is left is to be done within the target: normal priority's within its own, for it
    goes first, and all of it within the longer of the two. And no replica goes that is at work.
    """
    spare = max(0.0, load.ready - load.busy) * load.start_s

    def to_clear(requests: float, wait_s: float) -> int:
        left = max(0.0, requests * load.seconds - spare)
        return math.ceil(left / (wait_s + load.seconds))

    normal = to_clear(load.requests - load.low, rules.target_wait_s)
    everyone = to_clear(load.requests, max(rules.target_wait_s, rules.low_target_wait_s))
    at_work = min(load.replicas, math.ceil(load.busy / UTILISATION - NOTHING))
    return min(rules.most, max(normal, everyone, at_work, 1 if load.requests > 0 else 0))
