"""Processes for faults: forked from one that has imported everything and has neither threads nor engines."""

import asyncio
import multiprocessing
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from deployments import crash
from deployments.queue import migrations

PATIENCE_S = 120.0  # a process that takes longer has failed
PASSES = "passes"  # the file of the points that a process has passed

_forks = multiprocessing.get_context("forkserver")
# pytest, because the children of one that was started as a module import it once more
_forks.set_forkserver_preload(["pytest", "tests.faults.scenarios", "tests.faults.processes", "psycopg"])

_started: list[BaseProcess] = []

Play = Callable[..., Awaitable[None]]

migrations._revisions()  # read once, before the forks


def start(
    play: Play, *arguments: Any, crash_at: str | None = None, note_in: Path | None = None
) -> BaseProcess:
    """Run a coroutine function in a new process, which exits at a point, or notes those that it passes."""
    process = _forks.Process(target=_run, args=(play, arguments, crash_at, note_in), daemon=True)
    process.start()
    _started.append(process)
    return process


def run(play: Play, *arguments: Any, crash_at: str | None = None, note_in: Path | None = None) -> int:
    """As `start`, to its end. Returns the exit code."""
    process = start(play, *arguments, crash_at=crash_at, note_in=note_in)
    process.join(PATIENCE_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"{play.__name__} at {crash_at} did not end within {PATIENCE_S:.0f} s")
    return process.exitcode


def kill_all() -> None:
    """Leave nothing behind, the frozen included."""
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


def passes(folder: Path) -> Counter[str]:
    """How often each point was passed that was noted, in the order of their first pass."""
    return Counter((folder / PASSES).read_text().split())


def _run(play: Play, arguments: tuple[Any, ...], crash_at: str | None, note_in: Path | None) -> None:
    if crash_at is not None:
        crash.exit_at(crash_at)
    if note_in is not None:
        file = os.open(note_in / PASSES, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        crash.listen(lambda name: void(os.write(file, f"{name}\n".encode())))
    asyncio.run(play(*arguments))  # type: ignore[arg-type]


def void(_: object) -> None:
    """Forget a result."""
