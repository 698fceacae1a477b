"""Run by Alembic, on the connection and in the transaction that it was given."""

from alembic import context

from deployments import crash

context.configure(
    connection=context.config.attributes["connection"],
    on_version_apply=lambda **_: crash.point("migrate.stepped"),
)
context.run_migrations()
