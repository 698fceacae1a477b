"""The queue's front door."""

from deployments.queue.queue import Queue
from schemas.settings import LeaseSettings, local_path

__all__ = ["Queue", "open_queue"]


def open_queue(url: str, lease: LeaseSettings) -> Queue:
    """Open the queue at `sqlite:///PATH`; the file is made when absent. Needs a running event loop."""
    path = local_path(url.replace("sqlite:///", "sqlite://", 1), "sqlite")
    if path is None:
        raise ValueError(f"queue_url must begin with sqlite:///, got {url!r}")
    from deployments.queue.sqlite import SqliteDatabase

    return Queue(SqliteDatabase(path), lease)
