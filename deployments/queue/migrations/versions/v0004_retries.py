"""How often a request may run again, instead of whether."""

from alembic import op
from sqlalchemy import Boolean, Column, Integer, false, table, true, update

revision = "0004"
down_revision = "0003"

requests = table("requests", Column("retries", Boolean), Column("max_retries", Integer))


def upgrade() -> None:
    op.add_column("requests", Column("max_retries", Integer))
    op.execute(update(requests).where(requests.c.retries == false()).values(max_retries=0))
    op.drop_column("requests", "retries")


def downgrade() -> None:
    op.add_column("requests", Column("retries", Boolean, nullable=False, server_default=true()))
    op.execute(update(requests).where(requests.c.max_retries == 0).values(retries=false()))
    op.drop_column("requests", "max_retries")
