"""What falls due in the queue by the mere passing of time."""

from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping

from deployments import crash
from deployments.queue import rows
from deployments.queue import statements as sql
from deployments.queue.transitions import Setback, complete, erase, forget, put_back
from schemas.errors import StartTimeout
from schemas.jobs import JobResult, Record
from schemas.settings import LeaseSettings, Retention

KEY_S = 24 * 3600.0  # how long the key of a submit is remembered
UNKEPT_S = 3600.0  # how long what is not to be kept can be fetched
BATCH = 200  # of each kind in one transaction


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did."""

    count: int  # of requests that changed
    ended: tuple[Record, ...]  # those without a result before


def times(now: float, keep: Retention) -> dict[str, float]:
    """The parameters of the statements below."""
    return {
        "now": now,
        "unkept_before": now - UNKEPT_S,
        "finished_before": now - keep.results_s,
        "audited_before": now - keep.audit_s,
        "keys_before": now - KEY_S,
        "limit": BATCH,
    }


def sweep(connection: Connection, lease: LeaseSettings, times: dict[str, float]) -> Swept:
    """Do a batch of all that is due."""
    now = times["now"]
    lapsed = connection.execute(sql.LAPSED, times).mappings().all()
    for row in lapsed:
        put_back(connection, row, Setback.LAPSED, lease, now)
        crash.point("sweep.put_back")
    overdue = connection.execute(sql.OVERDUE, times).mappings().all()
    for row in overdue:
        complete(connection, rows.job(row), JobResult.failure(StartTimeout()), now)
        crash.point("sweep.timed_out")
    unkept = connection.scalars(sql.UNKEPT, times).all()
    for request_id in unkept:
        erase(connection, request_id)
        crash.point("sweep.erased")
    outlived = connection.scalars(sql.OUTLIVED, times).all()
    if outlived:
        forget(connection, outlived)
        crash.point("sweep.forgot")
    connection.execute(sql.FORGET_OLD_KEYS, times)
    crash.point("sweep.keys_forgotten")
    connection.execute(sql.FORGET_AUDIT, times)
    count = len(lapsed) + len(overdue) + len(unkept) + len(outlived)
    changed = (_record(connection, row) for row in (*lapsed, *overdue))
    return Swept(count, tuple(record for record in changed if record.result is not None))


def _record(connection: Connection, row: RowMapping) -> Record:
    place = {"request_id": row["request_id"], "tenant": row["tenant"]}
    return rows.record(connection.execute(sql.FIND, place).mappings().one(), None)
