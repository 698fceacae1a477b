"""The queue's tables as they were when revisions began.

An SQLite file may be older than that and have some of them, or some of their columns: what it lacks is
added. So each column that came late has a server default or may be null.
"""

from alembic import op
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    true,
)
from sqlalchemy.schema import CreateColumn

revision = "0001"
down_revision = None

metadata = MetaData()

Serial = BigInteger().with_variant(Integer, "sqlite")

Table(
    "requests",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("request_id", String(36), nullable=False),
    Column("endpoint_id", String(200), nullable=False),
    Column("model", String(100), nullable=False),
    Column("tenant", String(100), nullable=False),
    Column("input", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("base_url", Text, nullable=False),
    Column("webhook_url", Text),
    Column("previews", Boolean, nullable=False),
    Column("start_timeout_s", Float),
    Column("retries", Boolean, nullable=False, server_default=true()),
    Column("stores_io", Boolean, nullable=False, server_default=true()),
    Column("tags", JSON(none_as_null=True)),
    Column("keep_s", BigInteger),
    Column("state", String(10), nullable=False),
    Column("accepted_at", Float, nullable=False),
    Column("start_deadline", Float),
    Column("not_before", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("lease_owner", String(100)),
    Column("lease_until", Float),
    Column("fence", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("status", Integer),
    Column("body", JSON(none_as_null=True)),
    Column("error", Text),
    Column("error_type", String(100)),
    Column("retryable", Boolean),
    Column("inference_s", Float),
    UniqueConstraint("request_id"),
    Index("requests_waiting", "model", "state", "priority", "seq"),
    Index("requests_leased", "state", "lease_until"),
    Index("requests_not_kept", "stores_io", "state", "finished_at"),
    sqlite_autoincrement=True,
)

Table(
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

Table(
    "once",
    metadata,
    Column("tenant", String(100), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("request_id", String(36), nullable=False),
    Column("at", Float, nullable=False),
    Index("once_by_age", "at"),
)

Table(
    "deliveries",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("request_id", String(36), nullable=False),
    Column("url", Text, nullable=False),
    Column("host", String(255), nullable=False, server_default=""),
    Column("state", String(10), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("retries", Integer, nullable=False, server_default="0"),
    Column("next_attempt_at", Float, nullable=False),
    Column("lease_until", Float),
    Column("ended_at", Float),
    Column("last_status", Integer),
    Column("last_error", Text),
    UniqueConstraint("request_id", "url"),
    Index("deliveries_of_host", "state", "host", "next_attempt_at"),
    sqlite_autoincrement=True,
)

Table(
    "tries",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("delivery", Serial, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("began_at", Float, nullable=False),
    Column("status", Integer),
    Column("error", Text),
    Column("duration_s", Float),
    UniqueConstraint("delivery", "attempt"),
    sqlite_autoincrement=True,
)


def upgrade() -> None:
    connection = op.get_bind()
    metadata.create_all(connection)
    for table in metadata.sorted_tables:
        there = {column["name"] for column in inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                specification = CreateColumn(column).compile(connection)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {specification}")
        for index in table.indexes:
            index.create(connection, checkfirst=True)


def downgrade() -> None:
    metadata.drop_all(op.get_bind())
