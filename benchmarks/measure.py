"""What the benchmarks share: percentiles, CPU time of processes, tables, a server to measure."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support.server import Server, start, write_config

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
Cell = str | float | list[float]  # a list is one number a repeat
Row = Mapping[str, Cell]

console = Console(width=max(165, Console().width))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent * 10) // 1000) - 1)]


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds that the processes have used, their dead children included. Ticks are 10 ms."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS_PER_S


def timed(call: Callable[[], object]) -> float:
    """Seconds that the call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@contextmanager
def serving(folder: Path, front: dict[str, Any] | None = None, **model: Any) -> Iterator[Server]:
    """A server on the shipped configuration, one torch thread, its data in a folder below `folder`.

    `front` and `model` change their settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="server-", ignore_cleanup_errors=True) as data:
        server = start(write_config(Path(data), model={"cpu_threads": 1} | model, front=front or {}))
        try:
            yield server
        finally:
            server.kill()


def arguments(about: str) -> argparse.Namespace:
    """The options that all benchmarks take."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each row to FILE as a JSON line")
    parser.add_argument(
        "--dir", type=Path, default=Path("out/benchmarks"), help="where data is kept; on a real disk"
    )
    return parser.parse_args()


def header() -> None:
    """The machine and the versions: numbers mean nothing without them."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = names[0].partition(":")[2].strip() if names else platform.processor()
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "diffusers"))
    console.print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {cpu}, {os.cpu_count()} cores, load {load}")
    console.print(f"Python {platform.python_version()}, {versions}", highlight=False)


def show(title: str, rows: Sequence[Row], caption: str, file: Path | None = None) -> None:
    """Print the rows as a table, repeats as their median and range. The first row names the columns."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*map(_text, row.values()))
    console.print(table)
    if file is not None:
        with file.open("a") as lines:
            lines.writelines(
                json.dumps({"benchmark": title, **row}, ensure_ascii=False) + "\n" for row in rows
            )


def _text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list):
        return f"{_text(median(cell))} ({_text(min(cell))}–{_text(max(cell))})"
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
