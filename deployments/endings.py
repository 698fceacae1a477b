"""What is told of a request when it has ended: a line in the log, and its share of the metrics."""

import logging

from deployments import logs, metrics
from schemas.jobs import Record

logger = logging.getLogger(__name__)


def tell(record: Record) -> None:
    """The one line of a request that has ended; nothing before."""
    if record.result is None:
        return
    told = logs.outcome(record, record.result)
    logger.info("request ended: %s", logs.words(told), extra={"fields": told})
    model = record.job.model
    metrics.ENDED.add(
        model=model,
        endpoint=record.job.endpoint_id,
        status=str(record.result.status),
        error_type=record.result.error_type or "",
    )
    if record.started_at is not None and record.finished_at is not None:
        wait_s = record.started_at - record.accepted_at
        metrics.WAIT.observe(wait_s, model=model, priority=record.job.priority.name.lower())
        metrics.RUN.observe(record.finished_at - record.started_at, model=model)
