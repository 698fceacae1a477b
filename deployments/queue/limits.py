"""What a key may still submit. It is counted in the transaction of the submit, so that the limits hold over
every process that takes requests."""

from collections.abc import Iterable, Iterator, Mapping
from math import ceil

from sqlalchemy import Connection, RowMapping, Select, bindparam, func, select, update

from deployments.queue.tables import is_running, keys, requests
from schemas.access import Actor
from schemas.errors import NotAuthenticated, QueueFull, QuotaSpent, RequestError, TooManyRequests, TooManyRuns
from schemas.jobs import Priority, State

MINUTE_S = 60.0
DAY_S = 86_400
ROUNDING = 1e-6  # of a token: a request that comes when it was told to is taken

# All of the tenant's keys: two of them count the same requests, so they take turns. Always in one order.
LOCK = select(keys).where(keys.c.tenant == bindparam("tenant")).order_by(keys.c.key_id).with_for_update()
USE = update(keys).where(keys.c.key_id == bindparam("of"))


def _count(*states: State) -> Select[int]:
    """How many requests of a tenant are in these states; no more than `most` of them are looked at."""
    some = select(requests.c.seq).where(
        requests.c.tenant == bindparam("tenant"), requests.c.state.in_(states)
    )
    return select(func.count()).select_from(some.limit(bindparam("most")).subquery())


# How many more requests may run of each tenant that has a key with such a limit; its smallest counts.
_running = select(func.count()).where(requests.c.tenant == keys.c.tenant, is_running).scalar_subquery()
ROOMS = (
    select(keys.c.tenant, (func.min(keys.c.max_running) - _running).label("room"))
    .where(keys.c.max_running.is_not(None), keys.c.revoked_at.is_(None))
    .group_by(keys.c.tenant)
)

QUEUED = _count(State.QUEUED)
UNFINISHED = _count(State.QUEUED, State.RUNNING)


def rooms(connection: Connection) -> dict[str, int]:
    """Tenant → how many more of its requests may run. Those without a limit are not in it."""
    return {tenant: room for tenant, room in connection.execute(ROOMS)}


def within(
    found: Iterable[RowMapping], rooms: Mapping[str, int], low_room: int | None
) -> Iterator[RowMapping]:
    """The requests that may run now, in their order; at most `low_room` of low priority."""
    left = dict(rooms)
    for row in found:
        tenant, is_low = row["tenant"], row["priority"] == Priority.LOW
        if left.get(tenant, 1) <= 0 or (is_low and low_room is not None and low_room <= 0):
            continue
        if tenant in left:
            left[tenant] -= 1
        if is_low and low_room is not None:
            low_room -= 1
        yield row


def admit(connection: Connection, by: Actor, now: float, *, waits: bool) -> RequestError | None:
    """Count a submit, or say why it is refused; then nothing is counted. `waits`: it is a run.

    The refusal is returned, not raised: what shares the transaction need not begin again for it.
    """
    may = by.allowance
    if not may.counts:
        return None
    rows = connection.execute(LOCK, {"tenant": by.tenant}).mappings().all()
    row = next((each for each in rows if each["key_id"] == by.key_id), None)
    if row is None or row["revoked_at"] is not None:
        return NotAuthenticated("invalid key credentials")
    if may.max_running is not None and waits and _reached(connection, UNFINISHED, by, may.max_running):
        return TooManyRuns(f"At most {may.max_running} requests at once; the queue takes more.")
    if may.max_queued is not None and _reached(connection, QUEUED, by, may.max_queued):
        return QueueFull(f"{may.max_queued} requests wait already, which is as many as may.")
    used: dict[str, float] = {}
    if may.daily_requests is not None:
        day = int(now // DAY_S)
        spent = row["used"] if row["day"] == day else 0
        if spent >= may.daily_requests:
            left_s = ceil((day + 1) * DAY_S - now)
            return QuotaSpent(f"The {may.daily_requests} requests of this day (UTC) are used up.", left_s)
        used |= {"day": day, "used": spent + 1}
    if may.per_minute is not None:
        tokens = _tokens(row["tokens"], row["filled_at"], now, may.per_minute)
        if tokens < 1 - ROUNDING:
            wait_s = ceil((1 - tokens - ROUNDING) * MINUTE_S / may.per_minute)
            return TooManyRequests(f"At most {may.per_minute} requests a minute.", wait_s)
        used |= {"tokens": tokens - 1, "filled_at": now}
    if used:
        connection.execute(USE, {"of": by.key_id, **used})
    return None


def _reached(connection: Connection, count: Select[int], by: Actor, most: int) -> bool:
    found = connection.execute(count, {"tenant": by.tenant, "most": most}).scalar_one()
    return found >= most


def _tokens(then: float | None, filled_at: float | None, now: float, per_minute: int) -> float:
    """What the bucket has: it holds `per_minute` and fills at that pace, but not when the clock goes back."""
    if then is None or filled_at is None:
        return float(per_minute)
    return min(float(per_minute), then + max(0.0, now - filled_at) * per_minute / MINUTE_S)
