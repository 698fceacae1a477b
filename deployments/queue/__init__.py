"""The queue's front door."""

import re
from pathlib import Path

from deployments.queue.audit import Audit
from deployments.queue.database import Database
from deployments.queue.keys import KeyTable
from deployments.queue.outbox import Outbox
from deployments.queue.queue import Load, Queue
from deployments.queue.transitions import Setback
from schemas.settings import LeaseSettings, Retention, local_path

__all__ = [
    "Audit",
    "KeyTable",
    "Load",
    "Outbox",
    "Queue",
    "Setback",
    "migrate",
    "open_audit",
    "open_database",
    "open_keys",
    "open_outbox",
    "open_queue",
]


def open_queue(url: str, lease: LeaseSettings, keep: Retention | None = None) -> Queue:
    """Open the queue at `sqlite:///PATH` (the file is made when absent) or `postgresql://USER@HOST/DATABASE`.

    Its schema is brought up to date. Needs a running event loop. Raises StoreDown where the server cannot be
    reached, RuntimeError where the schema is newer than this code.
    """
    return Queue(open_database(url), lease, keep)


def open_outbox(url: str, lease_s: float) -> Outbox:
    """Open the webhooks of the queue at `url`, as `open_queue` does, on connections of their own."""
    return Outbox(open_database(url), lease_s)


def open_database(url: str) -> Database:
    """Open what lies beneath the queue at `url`, as `open_queue` does."""
    path = _path(url)
    if path is None:
        from deployments.queue.postgres import PostgresDatabase

        return PostgresDatabase(url)
    from deployments.queue.sqlite import SqliteDatabase

    return SqliteDatabase(path)


def open_keys(url: str) -> KeyTable:
    """Open the keys in the queue at `url`, as `open_queue` does, on connections of their own."""
    return KeyTable(open_database(url))


def open_audit(url: str) -> Audit:
    """Open the audit in the queue at `url`, as `open_queue` does, on connections of its own."""
    return Audit(open_database(url))


def migrate(url: str, to: str = "head") -> tuple[str | None, str | None]:
    """Bring the schema of the queue at `url` to a revision, up or down. Returns the revisions before and now.

    None is a database without tables, which "base" leads to. Raises ValueError for an unknown revision.
    """
    path = _path(url)
    if path is None:
        from deployments.queue import postgres

        return postgres.migrate(url, to)
    from deployments.queue import sqlite

    return sqlite.migrate(path, to)


def _path(url: str) -> Path | None:
    """The file of an SQLite URL, None for PostgreSQL's."""
    path = local_path(url.replace("sqlite:///", "sqlite://", 1), "sqlite")
    if path is None and not url.startswith("postgresql://"):
        shown = re.sub(r"(?<=://)[^/]*@", "…@", url)  # without the password
        raise ValueError(f"queue_url must begin with sqlite:/// or postgresql://, got {shown!r}")
    return path
