"""The queue's tables. One schema for every store.

Leases, fences, attempts and deliveries are part of it from the first day. Times are seconds since
the epoch, by the clock of the process that writes.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    false,
    literal_column,
    true,
)

from schemas.errors import Erased
from schemas.jobs import State

metadata = MetaData()

Serial = BigInteger().with_variant(Integer, "sqlite")  # where INTEGER is as wide, and numbers by itself

requests = Table(
    "requests",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),  # the order of acceptance
    Column("request_id", String(36), nullable=False),
    Column("endpoint_id", String(200), nullable=False),
    Column("model", String(100), nullable=False),
    Column("tenant", String(100), nullable=False),
    Column("input", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("turn", BigInteger, nullable=False, server_default="0"),  # among the tenants of its priority
    Column("base_url", Text, nullable=False),
    Column("webhook_url", Text),
    Column("previews", Boolean, nullable=False),
    Column("start_timeout_s", Float),
    Column("max_retries", Integer),
    Column("stores_io", Boolean, nullable=False, server_default=true()),
    Column("tags", JSON(none_as_null=True)),
    Column("keep_s", BigInteger),
    Column("traceparent", String(55)),
    Column("state", String(10), nullable=False),
    Column("accepted_at", Float, nullable=False),
    Column("start_deadline", Float),
    Column("not_before", Float, nullable=False),  # backoff after a crash
    Column("started_at", Float),
    Column("finished_at", Float),
    # the lease: who runs it, until when, and the number that its writes must carry
    Column("lease_owner", String(100)),
    Column("lease_until", Float),
    Column("fence", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    # the result: the HTTP answer, for ever the same
    Column("status", Integer),
    Column("body", JSON(none_as_null=True)),
    Column("error", Text),
    Column("error_type", String(100)),
    Column("retryable", Boolean),
    Column("inference_s", Float),
    UniqueConstraint("request_id"),
    sqlite_autoincrement=True,
)


def _constant(text: str) -> ColumnElement[str]:
    """In the SQL itself: a partial index serves no statement that has a parameter in its place."""
    return literal_column(f"'{text}'", String)


is_queued = requests.c.state == _constant(State.QUEUED)
is_running = requests.c.state == _constant(State.RUNNING)
is_completed = requests.c.state == _constant(State.COMPLETED)
is_unkept = and_(  # to be erased when its time comes
    is_completed,
    requests.c.stores_io == false(),
    requests.c.error_type.is_distinct_from(_constant(Erased.error_type)),
)


def _index_where(condition: ColumnElement[bool], name: str, *columns: str) -> None:
    """A partial index: rows enter and leave it as requests go through their states."""
    Index(name, *(requests.c[each] for each in columns), sqlite_where=condition, postgresql_where=condition)


_index_where(is_queued, "requests_turn", "model", "priority", "turn", "seq")
_index_where(is_queued, "requests_turn_of_tenant", "model", "priority", "tenant", "turn")
_index_where(
    and_(is_queued, requests.c.start_deadline.is_not(None)), "requests_start_deadline", "start_deadline"
)
_index_where(and_(is_queued, requests.c.fence > 0), "requests_backoff", "not_before")
_index_where(is_running, "requests_lease", "lease_until")
_index_where(is_completed, "requests_finished", "finished_at")
_index_where(is_unkept, "requests_unkept", "finished_at")
Index("requests_of_tenant", requests.c.tenant, requests.c.seq)
Index("requests_states_of_tenant", requests.c.tenant, requests.c.state)

# Every change of a request writes a row here: the caller's log, previews, and changes of state.
# The growing `seq` is the feed by which other processes learn what changed.
events = Table(
    "events",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("request_id", String(36), nullable=False),
    Column("kind", String(10), nullable=False),
    Column("at", Float, nullable=False),
    Column("payload", JSON(none_as_null=True)),
    Index("events_of_request", "request_id", "seq"),
    sqlite_autoincrement=True,
)

# The keys under which callers submitted: what comes again under one is answered with its request.
once = Table(
    "once",
    metadata,
    Column("tenant", String(100), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("request_id", String(36), nullable=False),
    Column("at", Float, nullable=False),
    Index("once_by_age", "at"),
)

# Webhooks that are owed, written in the transaction that ends the request.
deliveries = Table(
    "deliveries",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("request_id", String(36), nullable=False),
    Column("url", Text, nullable=False),
    Column("host", String(255), nullable=False, server_default=""),  # whose tries at once are bounded
    Column("state", String(10), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),  # tries begun; the number that an outcome must carry
    Column("retries", Integer, nullable=False, server_default="0"),  # of the schedule that are used up
    Column("next_attempt_at", Float, nullable=False),
    Column("lease_until", Float),  # while it is being sent
    Column("ended_at", Float),
    Column("last_status", Integer),
    Column("last_error", Text),
    UniqueConstraint("request_id", "url"),
    Index("deliveries_of_host", "state", "host", "next_attempt_at"),
    sqlite_autoincrement=True,
)

# The log of webhooks: a row for each try, written when it begins.
tries = Table(
    "tries",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("delivery", Serial, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("began_at", Float, nullable=False),
    Column("status", Integer),
    Column("error", Text),
    Column("duration_s", Float),  # null while there is no outcome
    UniqueConstraint("delivery", "attempt"),
    sqlite_autoincrement=True,
)

# Who does what only one process needs to do.
leaders = Table(
    "leaders",
    metadata,
    Column("role", String(50), primary_key=True),
    Column("owner", String(100), nullable=False),
    Column("lease_until", Float, nullable=False),
)

# The keys that open the server, beside those of its environment, and what each has used up. A row stays when
# its key is revoked: a server that once had keys is never open again.
keys = Table(
    "keys",
    metadata,
    Column("key_id", String(100), primary_key=True),
    Column("tenant", String(100), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("label", String(200), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
    # what it may, see schemas.access.Allowance
    Column("max_priority", Integer, nullable=False),
    Column("per_minute", Integer),
    Column("max_queued", Integer),
    Column("max_running", Integer),
    Column("daily_requests", Integer),
    # what it did: a token bucket, and the requests of a day
    Column("tokens", Float),  # at `filled_at`; null: full
    Column("filled_at", Float),
    Column("day", Integer),  # since the epoch
    Column("used", Integer, nullable=False, server_default="0"),  # on that day
    Index("keys_of_tenant", "tenant", "key_id"),
)

# Who did what. Rows are added, and never changed.
audit = Table(
    "audit",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("action", String(20), nullable=False),
    Column("tenant", String(100), nullable=False),
    Column("key_id", String(100)),
    Column("address", String(45)),
    Column("subject", String(100), nullable=False),
    Index("audit_of_tenant", "tenant", "seq"),
    sqlite_autoincrement=True,
)
