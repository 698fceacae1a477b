"""The queue's SQL, built once: putting a statement together costs more than running it."""

from sqlalchemy import BindParameter, and_, bindparam, delete, func, insert, or_, select, update

from deployments.queue.rows import STATE_CHANGE
from deployments.queue.tables import deliveries, events, once, requests
from schemas.errors import Erased
from schemas.jobs import State

_queued = requests.c.state == State.QUEUED
_running = requests.c.state == State.RUNNING
_now: BindParameter[float] = bindparam("now")

# --- requests ---

ACCEPT = insert(requests).returning(requests.c.seq)

FIND = select(requests).where(
    requests.c.request_id == bindparam("request_id"), requests.c.tenant == bindparam("tenant")
)

# A request that a claim's fence still holds.
HELD = (
    select(requests)
    .where(requests.c.request_id == bindparam("request_id"), requests.c.fence == bindparam("fence"), _running)
    .with_for_update()
)

# Change the columns that are given beside `of`.
SET = update(requests).where(requests.c.request_id == bindparam("of"))

_of_model = and_(requests.c.model == bindparam("model"), _queued)
_count = select(func.count()).select_from(requests)
_higher = _count.where(_of_model, requests.c.priority < bindparam("priority"))
_earlier = _count.where(
    _of_model, requests.c.priority == bindparam("priority"), requests.c.seq < bindparam("seq")
)

# How many queued requests of the model run before this one: two ranges of one index.
POSITION = select(_higher.scalar_subquery() + _earlier.scalar_subquery())

# The next requests of a model: the head of one index.
UPCOMING = (
    select(requests)
    .where(
        _of_model,
        requests.c.not_before <= _now,
        or_(requests.c.start_deadline.is_(None), requests.c.start_deadline > _now),
    )
    .order_by(requests.c.priority, requests.c.seq)
    .limit(bindparam("limit"))
)
CLAIMABLE = UPCOMING.with_for_update(skip_locked=True)

RENEW = (
    update(requests)
    .where(requests.c.request_id == bindparam("of"), requests.c.fence == bindparam("fence_held"), _running)
    .values(lease_until=bindparam("until"))
    .returning(requests.c.request_id)
)

REROUTE = (
    update(requests)
    .where(
        _queued, requests.c.endpoint_id == bindparam("endpoint"), requests.c.model != bindparam("to_model")
    )
    .values(model=bindparam("to_model"))
)

# What a dispatcher has to look after.
_lapsed = and_(_running, requests.c.lease_until < _now)
_overdue = and_(_queued, requests.c.start_deadline <= _now)
DUE = select(requests).where(or_(_lapsed, _overdue)).with_for_update(skip_locked=True)
ANY_DUE = select(requests.c.seq).where(or_(_lapsed, _overdue)).limit(1)
_owed = select(deliveries.c.request_id).where(
    deliveries.c.request_id == requests.c.request_id, deliveries.c.ended_at.is_(None)
)
_unkept = and_(
    ~_owed.exists(),  # a webhook is made of what would be erased
    requests.c.stores_io.is_(False),
    requests.c.state == State.COMPLETED,
    requests.c.finished_at <= bindparam("before"),
    requests.c.error_type.is_distinct_from(Erased.error_type),
)
UNKEPT = select(requests.c.request_id).where(_unkept).limit(100)
MODELS_WAITING = select(requests.c.model).where(_queued, requests.c.not_before <= _now).distinct()
CANCELLED = select(requests.c.request_id).where(
    _running, requests.c.cancel_requested, requests.c.lease_owner == bindparam("owner")
)
NEXT_DEADLINE = select(func.min(requests.c.start_deadline)).where(_queued)
NEXT_BACKOFF = select(func.min(requests.c.not_before)).where(_queued, requests.c.not_before > _now)

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
    .where(once.c.tenant == bindparam("tenant"), once.c.key == bindparam("key"))
)
REMEMBER_KEY = insert(once)
FORGET_KEY = delete(once).where(once.c.tenant == bindparam("tenant"), once.c.key == bindparam("key"))
FORGET_OLD_KEYS = delete(once).where(once.c.at < bindparam("before"))

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
