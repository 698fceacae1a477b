"""What stands in a log line, whatever the words are that go into it."""

import io
import json
import logging
from collections.abc import Iterator
from contextvars import copy_context
from logging.handlers import MemoryHandler
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.logs import MAX_CHARS, MAX_TRACE_CHARS, Json, about, clean, install, outcome, words
from schemas.jobs import JobResult, Record, State
from tests.support.jobs import make_job

PLAIN = logging.Formatter("%(levelname)s %(message)s")
FORMS: dict[str, logging.Formatter] = {"plain": PLAIN, "json": Json()}


class Lines:
    """A logger as Serve makes them: a buffer in front of what is written."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self._text = io.StringIO()
        written = logging.StreamHandler(self._text)
        written.setFormatter(formatter)
        self.log = logging.Logger("deployments.room")
        self.log.addHandler(MemoryHandler(1, target=written))
        install(self.log)

    @property
    def text(self) -> str:
        return self._text.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")[:-1]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lines(form: str) -> Iterator[Lines]:
    yield Lines(FORMS[form])


HOSTILE = [
    "a cat\nINFO everything is fine",
    "a cat\r\nINFO everything is fine",
    "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei",  # what str.splitlines ends a line at
    "\x1b[2J\x1b[31mred\x1b[0m\x07\x9b31m",  # ANSI, one and eight bits
    '", "level": "CRITICAL", "x": "',
    '{"a": 1}\\"}',
    "\\n \\u000a %s %d %(name)s {0}",
    "\ud800 half a character",
    "\u202egnp.exe",  # turned around
    "\x00\x08\x7f",
    "x" * 1_000_000,
    "<script>alert(1)</script>",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_t22_one_event_is_one_line_whatever_its_words(text: str, form: str, lines: Lines) -> None:
    lines.log.info("prompt %s", text)
    lines.log.info("after")
    assert len(lines.lines) == 2
    assert len(lines.text.splitlines()) == 2
    assert len(lines.text) < 7 * MAX_CHARS
    assert all(line.isprintable() for line in lines.lines)
    lines.text.encode("utf-8")
    if form == "json":
        parsed = [json.loads(line) for line in lines.lines]
        assert [set(each) for each in parsed] == [{"time", "level", "logger", "message"}] * 2
        assert [each["level"] for each in parsed] == ["INFO", "INFO"]
        assert parsed[0]["message"].startswith("prompt ")


@given(st.text(max_size=300))
def test_t22_any_text_becomes_a_line_of_its_own(text: str) -> None:
    cleaned = clean(text)
    assert len(cleaned.splitlines()) <= 1
    assert cleaned.isprintable()
    cleaned.encode("utf-8")


def test_t22_the_fields_of_an_event_are_as_clean_as_its_words() -> None:
    lines = Lines(Json())
    fields = {"request_id": "id\n{", "endpoint": "\x1b[0m", "status": 200, "level": "FAKE", "run_s": None}
    lines.log.info("ended", extra={"fields": fields})
    [line] = [json.loads(each) for each in lines.lines]
    assert line["level"] == "INFO"
    assert (line["request_id"], line["endpoint"], line["status"]) == ("id\\n{", "\\x1b[0m", 200)


def test_t22_a_traceback_forges_no_line(form: str, lines: Lines) -> None:
    try:
        raise ValueError("bad\nINFO forged\x1b[0m " + "x" * 100_000)
    except ValueError:
        lines.log.exception("it failed")
    if form == "json":
        [line] = [json.loads(each) for each in lines.lines]
        assert "ValueError" in line["traceback"]
    else:
        assert lines.lines[0] == "ERROR it failed"
        assert all(line.startswith("  | ") for line in lines.lines[1:])
        assert any("INFO forged\\x1b[0m" in line for line in lines.lines)
    assert len(lines.text) < 2 * MAX_TRACE_CHARS


def test_t22_a_message_that_does_not_fit_is_not_lost(lines: Lines) -> None:
    lines.log.info("%d pictures", "many")
    assert "many" in lines.text


def test_install_keeps_serve_s_choice_of_form_and_may_come_again() -> None:
    lines = Lines(logging.Formatter("%(levelname)s replica -- %(message)s"))
    install(lines.log)
    lines.log.info("hello")
    assert lines.lines == ["INFO replica -- hello"]

    class Objects(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return json.dumps({"message": record.getMessage()})

    lines = Lines(Objects())
    lines.log.info("hello")
    assert json.loads(lines.lines[0])["logger"] == "deployments.room"


CANARY = "c4n4ry"
LEAKS: list[Any] = [
    f"Authorization: Key me:{CANARY}",
    f"{{'authorization': 'Key me:{CANARY}'}}",
    f"(b'authorization', b'Bearer eyJ0.{CANARY}.x')",
    f"Headers({{'authorization': 'Basic {CANARY}=='}})",
    f"key me:{CANARY} was refused",
    f"https://example.com/x?token={CANARY}&a=b",
    f"https://example.com/x?a=b&X-Amz-Signature={CANARY}",
    f"GET /files/abc?ticket={CANARY} failed",
    f"PUT /files/abc/multipart/{CANARY}/3",
    f"https://user:{CANARY}@example.com/lora.safetensors",
    f"https://{CANARY}@example.com/",
    f"https://user:p@{CANARY}@example.com/",
    f"postgresql+psycopg://darkroom:{CANARY}@db.example:5432/darkroom",
    f"postgresql://db/darkroom?password={CANARY}",
    f"host=db user=x password={CANARY} dbname=y",
    f"aws_secret_access_key={CANARY}",
    f"AWS_SECRET_ACCESS_KEY='{CANARY}'",
    f"{{'secret_access_key': '{CANARY}'}}",
    f"s3://{CANARY}:{CANARY}@bucket/prefix?secret_access_key={CANARY}",
    f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----",
    f"-----BEGIN PRIVATE KEY----- {CANARY}",  # cut off
    f"data:image/png;base64,{CANARY}AAAA",
    f"fal_key={CANARY}",
    f"HTTPS://USER:{CANARY}@EXAMPLE.COM/?KEY={CANARY}",
]


@pytest.mark.parametrize("text", LEAKS)
def test_t23_no_secret_is_written_down(text: str, lines: Lines) -> None:
    lines.log.warning("%s", text)
    lines.log.warning(text.replace("%", "%%"), extra={"fields": {"request_id": text}})
    try:
        raise RuntimeError(text)
    except RuntimeError:
        lines.log.exception("it failed")
    assert len(lines.lines) >= 3
    assert CANARY not in lines.text


@pytest.mark.parametrize(
    "text",
    [
        "accepted 5b0c… for fal-ai/flux/dev",
        "the webhook of 123, try 1: 200 (delivered)",
        "refused a connection to example.com:443",
        "request 1 waits: no key of this name",
        "GET /files/0a1b.png failed, id",
        "https://example.com/owner/repo/file.safetensors",
        "loaded black-forest-labs/FLUX.1-dev in 3.1 s",
        "monkey business: a bearer of gifts",
    ],
)
def test_t23_ordinary_words_stay(text: str) -> None:
    assert clean(text) == text


def test_t23_hiding_takes_time_in_proportion() -> None:
    """Each would take minutes if a pattern went back over what it has read."""
    for text in ("a" * 50_000, "a." * 25_000, "://" * 15_000, "key " * 12_000, "-----BEGIN " * 4_000,
                 "http://" + "@" * 40_000, "secret" * 8_000, "token=" * 8_000, "data:" * 10_000):  # fmt: skip
        assert len(clean(text, 25_000)) <= 30_000


def test_lines_about_a_request_say_so_whoever_writes_them_when(lines: Lines, form: str) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with about("a-request", f"00-{trace}-b7ad6b7169203331-01"):
        lines.log.info("loaded")
        copy_context().run(lines.log.info, "on another thread")
        with about("another", None):
            lines.log.info("inside", extra={"fields": {"status": 200}})
        lines.log.info("after")
    lines.log.info("later")
    if form == "plain":
        said = ["loaded", "on another thread", "inside", "after", "later"]
        assert lines.lines == [f"INFO {each}" for each in said]
        return
    always = {"time", "level", "logger", "message"}
    told = [json.loads(line).items() for line in lines.lines]
    fields = [{name: value for name, value in each if name not in always} for each in told]
    mine = {"request_id": "a-request", "trace_id": trace}
    assert fields == [mine, mine, {"request_id": "another", "status": 200}, mine, {}]


def test_the_outcome_of_a_request_has_what_an_operator_asks_for() -> None:
    job = make_job(tenant="alice", traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    record = Record(job, State.COMPLETED, 10.0, started_at=12.5, finished_at=13.0, attempts=2)
    told = outcome(record, JobResult.success({}, 0.5))
    assert told == {
        "request_id": job.request_id,
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "endpoint": job.endpoint_id,
        "model": "flux",
        "tenant": "alice",
        "status": 200,
        "error_type": None,
        "queue_s": 2.5,
        "run_s": 0.5,
        "attempts": 2,
    }
    assert "status=200 queue_s=2.5 run_s=0.5 attempts=2" in words(told)
