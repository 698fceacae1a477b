"""Which trace a request is part of."""

from alembic import op
from sqlalchemy import Column, String

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("requests", Column("traceparent", String(55)))


def downgrade() -> None:
    op.drop_column("requests", "traceparent")
