"""The queue's front door."""

from pathlib import Path

from deployments.queue.audit import Audit
from deployments.queue.keys import KeyTable
from deployments.queue.outbox import Outbox
from deployments.queue.queue import Queue
from schemas.settings import LeaseSettings, local_path

__all__ = ["Audit", "KeyTable", "Outbox", "Queue", "open_audit", "open_keys", "open_outbox", "open_queue"]


def open_queue(url: str, lease: LeaseSettings) -> Queue:
    """Open the queue at `sqlite:///PATH`; the file is made when absent. Needs a running event loop."""
    from deployments.queue.sqlite import SqliteDatabase

    return Queue(SqliteDatabase(_path(url)), lease)


def open_outbox(url: str, lease_s: float) -> Outbox:
    """Open the webhooks of the queue at `url`, as `open_queue` does, on connections of their own."""
    from deployments.queue.sqlite import SqliteDatabase

    return Outbox(SqliteDatabase(_path(url)), lease_s)


def open_keys(url: str) -> KeyTable:
    """Open the keys in the queue at `url`, as `open_queue` does, on connections of their own."""
    from deployments.queue.sqlite import SqliteDatabase

    return KeyTable(SqliteDatabase(_path(url)))


def open_audit(url: str) -> Audit:
    """Open the audit in the queue at `url`, as `open_queue` does, on connections of its own."""
    from deployments.queue.sqlite import SqliteDatabase

    return Audit(SqliteDatabase(_path(url)))


def _path(url: str) -> Path:
    path = local_path(url.replace("sqlite:///", "sqlite://", 1), "sqlite")
    if path is None:
        raise ValueError(f"queue_url must begin with sqlite:///, got {url!r}")
    return path
