"""Log lines that a stranger's words cannot forge, and that tell no secrets.

Serve has handlers and formatters of its own; `install` puts ours around the latter, so that what Serve itself
says passes through here as well. With `logging_config: {encoding: JSON}` a line is one JSON object.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from deployments import traces
from schemas.errors import DarkroomError
from schemas.jobs import JobResult, Record

MAX_CHARS = 4_000  # of a message
MAX_TRACE_CHARS = 20_000
_READ_CHARS = 200_000  # what is looked through; a secret is hidden before anything is cut at a place of ours
HIDDEN = "[hidden]"

_subject: ContextVar[Mapping[str, str]] = ContextVar("subject", default={})  # noqa: B039  # never changed

# What Serve's filters and our own `extra` put on a record, as far as it belongs into a line.
_FIELDS = ("request_id", "tenant", "application", "deployment", "replica")

_SECRETS = (
    (re.compile(r"-----BEGIN [A-Z ]{0,40}KEY-----.*?(?:-----END [A-Z ]{0,40}-----|\Z)", re.DOTALL), HIDDEN),
    (re.compile(r"\b(data:[^,\s]{0,200}),[^\s'\"]+", re.IGNORECASE), rf"\1,{HIDDEN}"),
    # a URL keeps neither its user nor its query
    (
        re.compile(
            r"(?<![a-z])([a-z][a-z0-9+.-]{0,20}://)(?:[^\s/'\"<>]*@)?([^\s?'\"<>]*)(\?[^\s'\"<>]*)?", re.I
        ),
        lambda match: match[1] + match[2] + (f"?{HIDDEN}" if match[3] else ""),
    ),
    (re.compile(r"(/multipart/)[^/\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),  # a ticket
    (re.compile(r"\b(key|bearer|basic)(\s+)(?=[^\s'\"]{0,200}[:\d])[^\s'\",]{6,}", re.I), rf"\1\2{HIDDEN}"),
    (re.compile(r"(authorization['\"]?\s*[:=,]\s*b?['\"]?)[^'\"\r\n]+", re.I), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"\b((?:[\w-]{0,40}(?:secret|password|passwd|token|signature|credential|apikey|[_-]key)[\w-]{0,20}"
            r"|ticket|key|sig)['\"]?\s?[=:]\s?b?['\"]?)(?!//)[^\s&'\",;]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
)


def install(logger: logging.Logger) -> None:
    """Put our formatters around those of a logger's handlers. Again does no harm."""
    for handler in logger.handlers:
        handler.addFilter(_note_subject)
        written = getattr(handler, "target", None) or handler  # Serve's are behind a buffer
        inner = written.formatter or logging.Formatter()
        if not isinstance(inner, Plain | Json):
            written.setFormatter(Json() if _is_json(inner) else Plain(inner))


@contextmanager
def about(request_id: str, traceparent: str | None) -> Iterator[None]:
    """What is logged meanwhile in this task is about a request, and says so."""
    trace_id = traces.trace_id(traceparent)
    token = _subject.set({"request_id": request_id} | ({"trace_id": trace_id} if trace_id else {}))
    try:
        yield
    finally:
        _subject.reset(token)


def _note_subject(record: logging.LogRecord) -> bool:
    """Where the line was said: what writes it may come later, and for others."""
    if subject := _subject.get():
        record.__dict__["fields"] = {**subject, **getattr(record, "fields", {})}
    return True


def hidden(text: str) -> str:
    """The text without what must not be written down."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def outcome(record: Record, result: JobResult) -> dict[str, Any]:
    """What is said of a request that has ended."""
    started, finished = record.started_at, record.finished_at
    return {
        "request_id": record.job.request_id,
        "trace_id": traces.trace_id(record.job.traceparent),
        "endpoint": record.job.endpoint_id,
        "model": record.job.model,
        "tenant": record.job.tenant,
        "status": result.status,
        "error_type": result.error_type,
        "queue_s": _seconds(record.accepted_at, started or finished),
        "run_s": _seconds(started, finished),
        "attempts": record.attempts,
    }


def words(fields: Mapping[str, Any]) -> str:
    """`name=value name=value`, without what is unknown."""
    return " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)


def _seconds(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else round(end - begin, 3)


def why(error: DarkroomError) -> str:
    """What caused an error, in a line; its own words where nothing else did."""
    return str(error.__cause__ or error).partition("\n")[0]


def clean(text: str, limit: int = MAX_CHARS) -> str:
    """One line of at most about `limit` characters, without secrets."""
    return _escaped(_cut(hidden(text[:_READ_CHARS]), limit))


class Plain(logging.Formatter):
    """As another formatter, from a clean record."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        safe = logging.makeLogRecord(record.__dict__)
        safe.msg, safe.args, safe.exc_info, safe.stack_info = clean(_message(record)), None, None, None
        trace = _trace(record)
        safe.exc_text = "\n".join(f"  | {_escaped(line)}" for line in trace.split("\n")) if trace else None
        return self._inner.format(safe)


class Json(logging.Formatter):
    """An object a line: time, level, logger, message, and what else is known."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": clean(_message(record)),
        }
        told = {name: getattr(record, name) for name in _FIELDS if getattr(record, name, None) is not None}
        told |= getattr(record, "fields", {})
        line |= {name: value for name, value in _safe(told).items() if name not in line}
        if trace := _trace(record):
            line["traceback"] = trace
        return json.dumps(line)


def _safe(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers stay, all else becomes a clean text."""
    plain = (int, float, bool, type(None))
    return {name: each if isinstance(each, plain) else clean(str(each)) for name, each in fields.items()}


def _message(record: logging.LogRecord) -> str:
    """A message that does not fit its arguments is a fault of ours, but not one to lose a line for."""
    try:
        return record.getMessage()
    except (TypeError, ValueError):
        return f"{record.msg} {record.args}"


def _trace(record: logging.LogRecord) -> str:
    """The traceback in several lines, or nothing."""
    if not record.exc_info or not record.exc_info[0]:
        return ""
    text = logging.Formatter().formatException(record.exc_info)
    return _cut(hidden(text[:_READ_CHARS]), MAX_TRACE_CHARS)


def _cut(text: str, limit: int) -> str:
    """Its beginning and its end, where a traceback names the error."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _escaped(text: str) -> str:
    """Without controls, ends of lines in any script, turned writing, half characters."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _is_json(formatter: logging.Formatter) -> bool:
    probe = logging.makeLogRecord({"msg": "a probe", "levelname": "INFO", "levelno": logging.INFO})
    return formatter.format(probe).startswith("{")
