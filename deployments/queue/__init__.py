"""The queue's front door."""

from pathlib import Path

from deployments.queue.outbox import Outbox
from deployments.queue.queue import Queue
from deployments.queue.transitions import Setback
from schemas.settings import KEEP_RESULTS_S, LeaseSettings, local_path

__all__ = ["Outbox", "Queue", "Setback", "open_outbox", "open_queue"]


def open_queue(url: str, lease: LeaseSettings, keep_results_s: float = KEEP_RESULTS_S) -> Queue:
    """Open the queue at `sqlite:///PATH`; the file is made when absent. Needs a running event loop."""
    from deployments.queue.sqlite import SqliteDatabase

    return Queue(SqliteDatabase(_path(url)), lease, keep_results_s)


def open_outbox(url: str, lease_s: float) -> Outbox:
    """Open the webhooks of the queue at `url`, as `open_queue` does, on connections of their own."""
    from deployments.queue.sqlite import SqliteDatabase

    return Outbox(SqliteDatabase(_path(url)), lease_s)


def _path(url: str) -> Path:
    path = local_path(url.replace("sqlite:///", "sqlite://", 1), "sqlite")
    if path is None:
        raise ValueError(f"queue_url must begin with sqlite:///, got {url!r}")
    return path
