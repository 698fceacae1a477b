"""A real PostgreSQL server of the tests' own, from the binaries that pgserver's wheel carries."""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import psycopg

from deployments import queue
from deployments.queue.tables import metadata

START_TIMEOUT_S = 60.0
USER, TEMPLATE = "darkroom", "with_tables"


class PostgresServer:
    """One cluster in a folder of its own, reached over a Unix socket; every commit is synced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[Any] | None = None
        self._emptied: str | None = None

    def start(self) -> None:
        """Start it, as often as it was stopped, and wait until it answers."""
        options = ("-c", "listen_addresses=", "-c", "shared_buffers=32MB", "-c", "max_connections=200")
        command: list[str | Path] = [
            _binary("postgres"),
            "-D",
            self.folder / "data",
            "-k",
            self.folder,
            *options,
        ]
        with (self.folder / "log").open("ab") as log:
            process: subprocess.Popen[Any] = subprocess.Popen(
                command, stdout=log, stderr=log, **_as_user(self.folder)
            )
        self._process = process
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{(self.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.02)

    def stop(self, *, immediately: bool = False) -> None:
        """Stop it, in order or as after a crash: then nothing is written that was not on disk."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if immediately else signal.SIGINT)
            self._process.wait(START_TIMEOUT_S)
            self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@/{database}?host={quote(str(self.folder), safe='')}"

    def new_database(self, template: str = TEMPLATE) -> str:
        """The URL of a database of its own, with the queue's tables in it."""
        name = f"q{uuid4().hex}"
        self.run(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def emptied_database(self) -> str:
        """The URL of one that is used again and again: cheaper than a new one by far."""
        if self._emptied is None:
            self._emptied = self.new_database()
        tables = ", ".join(table.name for table in metadata.sorted_tables)
        with psycopg.connect(self._emptied, autocommit=True) as connection:
            connection.execute(f"SET lock_timeout = '10s'; TRUNCATE {tables} RESTART IDENTITY".encode())
        return self._emptied

    def run(self, statement: str) -> None:
        with self._connect() as connection:
            connection.execute(statement.encode())

    def _connect(self) -> "psycopg.Connection[Any]":
        return psycopg.connect(self.url("postgres"), autocommit=True)

    def _answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def postgres_at_work() -> Iterator[PostgresServer]:
    """A new server, and it is gone afterwards. Raises where none can be started."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-pg-", dir="/tmp"))  # a socket's path must be short
    user = _user()
    os.chown(folder, user.pw_uid, user.pw_gid)
    server = PostgresServer(folder)
    try:
        _make_cluster(folder)
        server.start()
        server.run(f"CREATE DATABASE {TEMPLATE}")
        queue.migrate(server.url(TEMPLATE))
        yield server
    finally:
        server.stop(immediately=True)
        shutil.rmtree(folder)


def _make_cluster(folder: Path) -> None:
    how = ("-U", USER, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
    command: list[str | Path] = [_binary("initdb"), "-D", folder / "data", *how]
    made = subprocess.run(command, capture_output=True, text=True, **_as_user(folder))
    if made.returncode:
        raise RuntimeError(f"PostgreSQL's initdb failed:\n{made.stdout}{made.stderr}")


def _binary(name: str) -> Path:
    found = importlib.util.find_spec("pgserver")  # importing it would look for servers of its own
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("pgserver is not installed: pip install '.[dev]'")
    return Path(found.submodule_search_locations[0]) / "pginstall" / "bin" / name


def _user() -> pwd.struct_passwd:
    """Who runs the server: PostgreSQL refuses root."""
    return pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())


def _as_user(folder: Path) -> dict[str, Any]:
    changes = {"user": _user().pw_uid, "group": _user().pw_gid, "extra_groups": []}
    return {"cwd": folder, "start_new_session": True, **(changes if os.getuid() == 0 else {})}
