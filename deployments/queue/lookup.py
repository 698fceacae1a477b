"""What is known of a request, as one transaction sees it."""

from sqlalchemy import Connection, RowMapping

from deployments.queue import rows
from deployments.queue import statements as sql
from schemas.jobs import Event, Record, State

MAX_POSITION = 10_000  # positions beyond are told as this: each look would cost more than a start


def find(connection: Connection, request_id: str, tenant: str) -> Record | None:
    """A tenant's request; None where it has none of this id."""
    row = connection.execute(sql.FIND, {"request_id": request_id, "tenant": tenant}).mappings().first()
    if row is None:
        return None
    is_queued = row["state"] == State.QUEUED
    return rows.record(row, position(connection, row) if is_queued else None)


def position(connection: Connection, row: RowMapping) -> int:
    """How many queued requests of the model run before this one, up to MAX_POSITION."""
    wanted = {name: row[name] for name in ("model", "priority", "turn", "seq")}
    return int(connection.execute(sql.POSITION, {**wanted, "most": MAX_POSITION}).scalar_one())


def events(connection: Connection, request_id: str, after: int) -> list[Event]:
    """Those of a request with `seq` above `after`, in order."""
    wanted = {"request_id": request_id, "after": after}
    return [rows.event(row) for row in connection.execute(sql.EVENTS, wanted).mappings()]


def snapshot(
    connection: Connection, request_id: str, tenant: str, after: int
) -> tuple[Record | None, list[Event]]:
    """A request and its events with `seq` above `after`."""
    return find(connection, request_id, tenant), events(connection, request_id, after)
