"""Keys with their limits, and the audit."""

from alembic import op
from sqlalchemy import BigInteger, Column, Float, Integer, String

revision = "0003"
down_revision = "0002"

Serial = BigInteger().with_variant(Integer, "sqlite")


def upgrade() -> None:
    op.create_index("requests_states_of_tenant", "requests", ["tenant", "state"])
    op.create_table(
        "keys",
        Column("key_id", String(100), primary_key=True),
        Column("tenant", String(100), nullable=False),
        Column("digest", String(64), nullable=False),
        Column("label", String(200), nullable=False),
        Column("created_at", Float, nullable=False),
        Column("revoked_at", Float),
        Column("max_priority", Integer, nullable=False),
        Column("per_minute", Integer),
        Column("max_queued", Integer),
        Column("max_running", Integer),
        Column("daily_requests", Integer),
        Column("tokens", Float),
        Column("filled_at", Float),
        Column("day", Integer),
        Column("used", Integer, nullable=False, server_default="0"),
    )
    op.create_index("keys_of_tenant", "keys", ["tenant", "key_id"])
    op.create_table(
        "audit",
        Column("seq", Serial, primary_key=True, autoincrement=True),
        Column("at", Float, nullable=False),
        Column("action", String(20), nullable=False),
        Column("tenant", String(100), nullable=False),
        Column("key_id", String(100)),
        Column("address", String(45)),
        Column("subject", String(100), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("audit_of_tenant", "audit", ["tenant", "seq"])


def downgrade() -> None:
    op.drop_table("audit")
    op.drop_table("keys")
    op.drop_index("requests_states_of_tenant", "requests")
