"""The schema's revisions, and the way from one to another. See README.md."""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

Move = tuple[str | None, str | None]  # the revisions before and after; None: no tables


def move(connection: Connection, to: str = "head") -> Move:
    """Bring the schema to a revision, up or down; "base" is a database without tables.

    Runs in the caller's transaction. Raises RuntimeError when the schema is newer than this code,
    ValueError when there is no such revision.
    """
    before = _current(connection)
    if before is not None and before not in _revisions():
        raise RuntimeError(
            f"The queue's database is at revision {before}, of a newer darkroom: this one knows "
            f"{', '.join(_revisions())}. Use the newer one, also to migrate it down."
        )
    target = _target(to)
    if target == before:
        return before, before
    config = _config()
    config.attributes["connection"] = connection
    if target is None or (before is not None and target < before):
        command.downgrade(config, target or "base")
    else:
        command.upgrade(config, target)
    return before, _current(connection)


def _target(to: str) -> str | None:
    if to == "base":
        return None
    if to == "head":
        return _revisions()[-1]
    if to not in _revisions():
        raise ValueError(f"There is no revision {to!r}: head, base, or one of {', '.join(_revisions())}.")
    return to


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


@cache
def _revisions() -> tuple[str, ...]:
    """All of them, the oldest first. They grow in the order of the alphabet."""
    known = ScriptDirectory.from_config(_config()).walk_revisions()
    return tuple(reversed([script.revision for script in known]))


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
