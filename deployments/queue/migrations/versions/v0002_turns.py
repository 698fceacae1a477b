"""Tenants take turns; every look at the queue walks along an index of its own; one process leads."""

from alembic import op
from sqlalchemy import BigInteger, Column, Float, String, text

revision = "0002"
down_revision = "0001"

QUEUED, RUNNING, COMPLETED = "state = 'queued'", "state = 'running'", "state = 'completed'"

# name, columns, where
PARTIAL = (
    ("requests_turn", ("model", "priority", "turn", "seq"), QUEUED),
    ("requests_turn_of_tenant", ("model", "priority", "tenant", "turn"), QUEUED),
    ("requests_start_deadline", ("start_deadline",), f"{QUEUED} AND start_deadline IS NOT NULL"),
    ("requests_backoff", ("not_before",), f"{QUEUED} AND fence > 0"),
    ("requests_lease", ("lease_until",), RUNNING),
    ("requests_finished", ("finished_at",), COMPLETED),
)
UNKEPT = {
    "sqlite": f"{COMPLETED} AND stores_io = 0 AND error_type IS NOT 'payloads_deleted'",
    "postgresql": f"{COMPLETED} AND stores_io = false AND error_type IS DISTINCT FROM 'payloads_deleted'",
}

BEFORE = (
    ("requests_waiting", ("model", "state", "priority", "seq")),
    ("requests_leased", ("state", "lease_until")),
    ("requests_not_kept", ("stores_io", "state", "finished_at")),
)


def upgrade() -> None:
    for name, _ in BEFORE:
        op.drop_index(name, "requests")
    op.add_column("requests", Column("turn", BigInteger, nullable=False, server_default="0"))
    for name, columns, where in PARTIAL:
        _create_where(where, name, columns)
    _create_where(UNKEPT[op.get_bind().dialect.name], "requests_unkept", ("finished_at",))
    op.create_index("requests_of_tenant", "requests", ["tenant", "seq"])
    op.create_table(
        "leaders",
        Column("role", String(50), primary_key=True),
        Column("owner", String(100), nullable=False),
        Column("lease_until", Float, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("leaders")
    for name in ("requests_of_tenant", "requests_unkept", *(name for name, _, _ in PARTIAL)):
        op.drop_index(name, "requests")
    op.drop_column("requests", "turn")
    for name, columns in BEFORE:
        op.create_index(name, "requests", list(columns))


def _create_where(condition: str, name: str, columns: tuple[str, ...]) -> None:
    where = text(condition)
    op.create_index(name, "requests", list(columns), sqlite_where=where, postgresql_where=where)
