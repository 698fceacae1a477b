"""The way of a database from one revision to another, on every store."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect, text
from typer.testing import CliRunner

from deployments import queue as front
from deployments.cli import app
from deployments.queue import Outbox, migrate, migrations, open_database, open_queue
from deployments.queue.tables import metadata
from schemas.jobs import State
from schemas.settings import LeaseSettings
from tests.support.jobs import make_job
from tests.support.postgres import PostgresServer

PROCESSES = 3
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables, on every store there is."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/queue.sqlite3"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database("template1")


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def differences(url: str) -> list[Any]:
    """Between the database and the tables that the code has."""
    with connected(url) as connection:
        # on SQLite the default '' is taken for another one, each time
        has_defaults = connection.dialect.name != "sqlite"
        context = MigrationContext.configure(connection, opts={"compare_server_default": has_defaults})
        return list(compare_metadata(context, metadata))


def tables(url: str) -> set[str]:
    with connected(url) as connection:
        return set(inspect(connection).get_table_names()) - {"sqlite_sequence", "alembic_version"}


def newest() -> str:
    return migrations._revisions()[-1]


def test_an_empty_database_becomes_what_the_code_expects(empty_url: str) -> None:
    assert migrate(empty_url) == (None, newest())
    assert differences(empty_url) == []
    assert migrate(empty_url) == (newest(), newest())


def test_the_way_down_leads_to_no_tables_and_up_again(empty_url: str) -> None:
    migrate(empty_url)
    assert tables(empty_url) == set(metadata.tables)
    assert migrate(empty_url, "base") == (newest(), None)
    assert tables(empty_url) == set()
    migrate(empty_url)
    assert differences(empty_url) == []


def test_every_revision_is_reached_from_both_sides(empty_url: str) -> None:
    for revision in migrations._revisions():
        assert migrate(empty_url, revision)[1] == revision
    for revision in reversed(migrations._revisions()):
        assert migrate(empty_url, revision)[1] == revision
    migrate(empty_url)
    assert differences(empty_url) == []


async def test_requests_outlive_every_revision_down_to_the_first(empty_url: str) -> None:
    jobs = [make_job(webhook_url="https://there.example"), make_job(max_retries=0)]
    queue = open_queue(empty_url, LeaseSettings())
    for job in jobs:
        await queue.submit(job)
    await queue.close()
    migrate(empty_url, "0001")
    migrate(empty_url)
    queue = open_queue(empty_url, LeaseSettings())
    assert [claim.job for claim in await queue.claim("flux", "one", 9)] == jobs
    await queue.close()


OPENER = """
import asyncio, sys
from deployments.queue import open_queue
from schemas.settings import LeaseSettings
from tests.support.jobs import make_job

async def run():
    print("ready", flush=True)
    sys.stdin.readline()
    queue = open_queue(sys.argv[1], LeaseSettings())
    await queue.submit(make_job())
    await queue.close()

asyncio.run(run())
"""


def test_processes_may_open_an_empty_database_at_once(empty_url: str) -> None:
    command = [sys.executable, "-c", OPENER, empty_url]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("now\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * PROCESSES
    assert differences(empty_url) == []
    with connected(empty_url) as connection:
        assert connection.execute(text("SELECT count(*) FROM requests")).scalar() == PROCESSES


async def test_a_newer_database_is_refused_and_left_alone(empty_url: str) -> None:
    migrate(empty_url)
    with connected(empty_url) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for attempt in (open_database, migrate, lambda url: migrate(url, "base")):
        with pytest.raises(RuntimeError, match="9999.*newer"):
            attempt(empty_url)
    assert tables(empty_url) == set(metadata.tables)


def test_an_unknown_revision_is_refused_with_what_there_is(empty_url: str) -> None:
    with pytest.raises(ValueError, match="'0999'.*base.*0001"):
        migrate(empty_url, "0999")
    assert tables(empty_url) == set()


def test_a_revision_that_fails_leaves_nothing_behind(
    empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(empty_url)
    copy = tmp_path / "migrations"
    shutil.copytree(Path(migrations.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "versions" / "v9999_fails.py").write_text(
        f"from alembic import op\nrevision, down_revision = '9999', {newest()!r}\n"
        "def upgrade():\n    op.execute('CREATE TABLE half (a int)')\n    op.execute('SELECT nonsense')\n"
    )
    monkeypatch.setattr(migrations, "__file__", str(copy / "__init__.py"))
    migrations._revisions.cache_clear()
    try:
        with pytest.raises(Exception, match="nonsense"):
            migrate(empty_url)
    finally:
        monkeypatch.undo()
        migrations._revisions.cache_clear()
    assert "half" not in tables(empty_url)
    assert migrate(empty_url) == (newest(), newest())


async def test_a_file_from_before_revisions_is_taken_over_with_its_requests(tmp_path: Path) -> None:
    """It has all tables and no revision, as the last version without them wrote it."""
    path = tmp_path / "queue.sqlite3"
    url = f"sqlite:///{path}"
    queue = open_queue(url, LeaseSettings())
    job = make_job()
    await queue.submit(job)
    await queue.close()
    migrate(url, "0001")
    with closing(sqlite3.connect(path)) as older, older:
        older.execute("DROP TABLE alembic_version")
        older.execute("DROP INDEX requests_not_kept")
        older.execute("ALTER TABLE requests DROP COLUMN stores_io")
        older.execute("DROP TABLE tries")
    assert migrate(url) == (None, newest())
    assert differences(url) == []
    queue = open_queue(url, LeaseSettings())
    record = await queue.get(job.request_id, job.tenant)
    assert record is not None
    assert (record.job, record.state) == (job, State.QUEUED)
    await queue.close()


async def test_a_much_older_file_gets_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "queue.sqlite3"
    with closing(sqlite3.connect(path)) as older, older:
        older.execute(
            """CREATE TABLE deliveries (
                seq INTEGER PRIMARY KEY AUTOINCREMENT, request_id VARCHAR(36) NOT NULL, url TEXT NOT NULL,
                state VARCHAR(10) NOT NULL, created_at FLOAT NOT NULL, attempts INTEGER NOT NULL,
                next_attempt_at FLOAT NOT NULL, last_status INTEGER, last_error TEXT,
                UNIQUE (request_id, url))"""
        )
        older.execute(
            "INSERT INTO deliveries (request_id, url, state, created_at, attempts, next_attempt_at) "
            "VALUES ('old', 'http://there', 'due', 1, 0, 1)"
        )
    for _ in range(2):  # the second time there is nothing to do
        outbox: Outbox = front.open_outbox(f"sqlite:///{path}", 60)
        assert await outbox.due_hosts() == [""]
        [record] = await outbox.newest(9)
        assert (record.request_id, record.ended_at) == ("old", None)
        await outbox.close()


def test_the_command_line_goes_both_ways_and_says_what_it_did(empty_url: str) -> None:
    def run(*options: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["migrate", "--queue-url", empty_url, *options])
        return done.exit_code, done.output

    assert run() == (0, f"from no tables to {newest()}\n")
    assert run("--to", "base") == (0, f"from {newest()} to no tables\n")
    code, output = run("--to", "nowhere")
    assert code == 1
    assert "nowhere" in output


def test_the_command_line_takes_the_queue_of_the_configuration(
    empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (ROOT / "serve_config.yaml").read_text()
    default = "sqlite:///~/.local/share/darkroom/queue.sqlite3"
    assert default in config
    (tmp_path / "serve_config.yaml").write_text(config.replace(default, f'"{empty_url}"'))
    done = CliRunner().invoke(app, ["migrate", "--config", str(tmp_path / "serve_config.yaml")])
    assert done.exit_code == 0, done.output
    assert differences(empty_url) == []


def test_the_command_line_says_when_there_is_no_database(tmp_path: Path) -> None:
    url = f"postgresql://me:s3cret@/nothing?host={tmp_path}"
    done = CliRunner().invoke(app, ["migrate", "--queue-url", url])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "StoreDown" in done.output
    assert "s3cret" not in done.output
