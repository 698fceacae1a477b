"""The queue's SQL, built once: putting a statement together costs more than running it."""

from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    ScalarSelect,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    union_all,
    update,
)

from deployments.queue.rows import STATE_CHANGE
from deployments.queue.tables import (
    audit,
    deliveries,
    events,
    is_completed,
    is_queued,
    is_running,
    is_unkept,
    leaders,
    once,
    requests,
    tries,
)
from schemas.jobs import State

_now: BindParameter[float] = bindparam("now")

# --- requests ---

_of_model = and_(requests.c.model == bindparam("model"), is_queued)
_of_priority = and_(_of_model, requests.c.priority == bindparam("priority"))

# Start-time fair queuing (Goyal, Vin and Cheng, SIGCOMM 1996, equation 1) with every request of the same
# cost: a request's turn is the one after its tenant's last, but never before what is served now.
_of_own = select(requests.c.turn + 1).where(_of_priority, requests.c.tenant == bindparam("tenant"))
_served = select(requests.c.turn).where(_of_priority)
# Not max and min, for which PostgreSQL reads all of a queue whose growth its statistics have not seen.
_after_own = _of_own.order_by(requests.c.turn.desc()).limit(1).scalar_subquery()
_served_now = _served.order_by(requests.c.turn).limit(1).scalar_subquery()
_turns = union_all(select(_after_own.label("turn")), select(_served_now)).subquery()
_own = select(func.coalesce(func.max(_turns.c.turn), 0).label("turn")).cte("own")

_higher = select(requests.c.seq).where(_of_model, requests.c.priority < bindparam("priority"))


def _up_to_most(earlier: ColumnElement[bool]) -> ScalarSelect[int]:
    """How many queued requests of the model run earlier, up to a number: two ranges of one index."""
    same = select(requests.c.seq).where(_of_priority, earlier)
    counted = union_all(_higher, same).limit(bindparam("most")).subquery()
    return select(func.count()).select_from(counted).scalar_subquery()


# The turn of a request that comes now, and its position.
_own_turn = select(_own.c.turn).scalar_subquery()
PLACE = select(_own.c.turn, _up_to_most(requests.c.turn <= _own_turn).label("position"))

ACCEPT = insert(requests)

# The position of one that is queued.
_place = tuple_(bindparam("turn"), bindparam("seq"))
POSITION = select(_up_to_most(tuple_(requests.c.turn, requests.c.seq) < _place))

FIND = select(requests).where(
    requests.c.request_id == bindparam("request_id"), requests.c.tenant == bindparam("tenant")
)

# A request that a claim's fence still holds.
HELD = (
    select(requests)
    .where(
        requests.c.request_id == bindparam("request_id"), requests.c.fence == bindparam("fence"), is_running
    )
    .with_for_update()
)

# Change the columns that are given beside `of`.
SET = update(requests).where(requests.c.request_id == bindparam("of"))

# The next requests of a model: the head of one index.
_may_start = and_(
    requests.c.not_before <= _now,
    or_(requests.c.start_deadline.is_(None), requests.c.start_deadline > _now),
)
UPCOMING = (
    select(requests)
    .where(_of_model, _may_start)
    .order_by(requests.c.priority, requests.c.turn, requests.c.seq)
    .limit(bindparam("limit"))
)
CLAIMABLE = UPCOMING.with_for_update(skip_locked=True)
BACKLOG = select(func.count()).select_from(
    select(requests.c.seq)
    .where(_of_model, requests.c.priority == bindparam("priority"), _may_start)
    .limit(bindparam("limit"))
    .subquery()
)
_beside_full = requests.c.tenant.not_in(bindparam("full", expanding=True))
UPCOMING_BESIDE, CLAIMABLE_BESIDE = UPCOMING.where(_beside_full), CLAIMABLE.where(_beside_full)


def _load(of: ColumnElement[bool], state: State) -> Select[Any]:
    """How many requests of each model and priority are in a state, and when the first was accepted.

    The groups are read from an index alone.
    """
    kinds = requests.c.model, requests.c.priority
    counts = func.count().label("count"), func.min(requests.c.seq).label("first")
    groups = select(*kinds, *counts).where(of).group_by(*kinds).subquery()
    named = literal(str(state)).label("state")
    facts = groups.c.model, groups.c.priority, named, groups.c.count, requests.c.accepted_at.label("since")
    return select(*facts).join_from(groups, requests, requests.c.seq == groups.c.first)


LOADS = union_all(_load(is_queued, State.QUEUED), _load(is_running, State.RUNNING))
ANY_CLAIMABLE = select(requests.c.seq).where(_of_model, _may_start).limit(1)

RENEW = (
    update(requests)
    .where(requests.c.request_id == bindparam("of"), requests.c.fence == bindparam("fence_held"), is_running)
    .values(lease_until=bindparam("until"))
    .returning(requests.c.request_id)
)

REROUTE = (
    update(requests)
    .where(
        is_queued, requests.c.endpoint_id == bindparam("endpoint"), requests.c.model != bindparam("to_model")
    )
    .values(model=bindparam("to_model"))
)

CANCELLED = select(requests.c.request_id).where(
    is_running, requests.c.cancel_requested, requests.c.lease_owner == bindparam("owner")
)
NEXT_DEADLINE = select(func.min(requests.c.start_deadline)).where(
    is_queued, requests.c.start_deadline.is_not(None)
)
NEXT_BACKOFF = select(func.min(requests.c.not_before)).where(
    is_queued, requests.c.fence > 0, requests.c.not_before > _now
)

# --- upkeep: what has fallen due, each along an index of its own ---

_lapsed = and_(is_running, requests.c.lease_until < _now)
_overdue = and_(is_queued, requests.c.start_deadline <= _now)
LAPSED = select(requests).where(_lapsed).limit(bindparam("limit")).with_for_update(skip_locked=True)
OVERDUE = select(requests).where(_overdue).limit(bindparam("limit")).with_for_update(skip_locked=True)

# A webhook is made of what would be erased.
_owes = exists().where(deliveries.c.request_id == requests.c.request_id, deliveries.c.ended_at.is_(None))
_unkept = and_(is_unkept, requests.c.finished_at <= bindparam("unkept_before"), ~_owes)
UNKEPT = select(requests.c.request_id).where(_unkept).limit(bindparam("limit"))
_outlived = and_(is_completed, requests.c.finished_at <= bindparam("finished_before"), ~_owes)
OUTLIVED = select(requests.c.request_id).where(_outlived).limit(bindparam("limit"))
_oldest_audited = select(audit.c.seq, audit.c.at).order_by(audit.c.seq).limit(bindparam("limit")).subquery()
OLD_AUDIT = select(_oldest_audited.c.seq).where(_oldest_audited.c.at <= bindparam("audited_before"))
FORGET_AUDIT = delete(audit).where(audit.c.seq.in_(OLD_AUDIT))
_old_key = once.c.at < bindparam("keys_before")

ANY_UPKEEP = select(
    or_(
        exists().where(_lapsed),
        exists().where(_overdue),
        exists().where(_unkept),
        exists().where(_outlived),
        exists().where(_old_key),
        OLD_AUDIT.exists(),
    )
)

_theirs: BindParameter[list[str]] = bindparam("request_ids", expanding=True)
_their_deliveries = select(deliveries.c.seq).where(deliveries.c.request_id.in_(_theirs))

# Delete requests and all that hangs on them, in this order.
FORGET = (
    delete(tries).where(tries.c.delivery.in_(_their_deliveries)),
    delete(deliveries).where(deliveries.c.request_id.in_(_theirs)),
    delete(events).where(events.c.request_id.in_(_theirs)),
    delete(requests).where(requests.c.request_id.in_(_theirs)),
)

# --- leaders ---

LEADER = select(leaders).where(leaders.c.role == bindparam("of_role"))
FIRST_LEADER = insert(leaders)
LEAD = (
    update(leaders)
    .where(
        leaders.c.role == bindparam("of_role"),
        or_(leaders.c.owner == bindparam("by"), leaders.c.lease_until < _now),
    )
    .values(owner=bindparam("by"), lease_until=bindparam("until"))
    .returning(leaders.c.role)
)

# A tenant's newest requests, of some endpoints or of all.
_newest_first = (
    select(requests)
    .where(requests.c.tenant == bindparam("tenant"), requests.c.seq < bindparam("before"))
    .order_by(requests.c.seq.desc())
    .limit(bindparam("limit"))
)
RECENT = _newest_first
RECENT_OF = _newest_first.where(requests.c.endpoint_id.in_(bindparam("endpoints", expanding=True)))

# --- keys of submits ---

SUBMITTED = (
    select(requests, once.c.fingerprint.label("once_fingerprint"))
    .join(once, once.c.request_id == requests.c.request_id)
    .where(
        once.c.tenant == bindparam("tenant"),
        once.c.key == bindparam("key"),
        once.c.at >= bindparam("keys_before"),
    )
)
REMEMBER_KEY = insert(once)
FORGET_KEY = delete(once).where(once.c.tenant == bindparam("tenant"), once.c.key == bindparam("key"))
FORGET_OLD_KEYS = delete(once).where(_old_key)

# --- events and deliveries ---

APPEND = insert(events)

EVENTS = (
    select(events)
    .where(
        events.c.request_id == bindparam("request_id"),
        events.c.seq > bindparam("after"),
        events.c.kind != STATE_CHANGE,
    )
    .order_by(events.c.seq)
)

FORGET_PREVIEWS = delete(events).where(
    events.c.request_id == bindparam("request_id"), events.c.kind == "preview"
)

FORGET_EVENTS = delete(events).where(
    events.c.request_id == bindparam("request_id"), events.c.kind != STATE_CHANGE
)

NEWEST = select(func.coalesce(func.max(events.c.seq), 0))

CHANGES = select(events.c.seq, events.c.request_id).where(events.c.seq > bindparam("after"))

OWE = insert(deliveries)

OWED = select(deliveries.c.seq).where(
    deliveries.c.request_id == bindparam("request_id"), deliveries.c.ended_at.is_(None)
)
