"""A process exits at every named point, one after another; the next one on the same store sets it right."""

import ast
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments import crash, queue
from tests.faults import processes, scenarios
from tests.faults.fronts import Place
from tests.faults.history import History
from tests.faults.judging import prepare, verdict
from tests.support.postgres import PostgresServer
from tests.support.receivers import Receiver

ROOT = Path(__file__).parents[2]
LEAST = 60  # points that each store must survive
STORES = ("sqlite", "postgres")
TRIES = 3  # of what only happens when two things meet
PASSES = int(os.environ.get("DARKROOM_FAULTS", "1"))  # of a point at which a process exits

Make = Callable[[str], Place]


def points() -> list[str]:
    """All that stand in the code."""
    found: list[str] = []
    for path in sorted((ROOT / "deployments").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "crash.point":
                [name] = node.args
                found.append(ast.literal_eval(name))
    return found


@pytest.fixture(params=STORES)
def make_place(request: pytest.FixtureRequest, tmp_path: Path, receiver: Receiver) -> Make:
    """Places with an empty queue, on every store."""
    if request.param == "sqlite":
        template = tmp_path / "template.sqlite3"
        queue.migrate(f"sqlite:///{template}")

        def make(name: str) -> Place:
            url = f"sqlite:///{tmp_path}/{name}/queue.sqlite3"
            place = Place(tmp_path / name, url, receiver.url).clear()
            shutil.copy(template, place.folder / "queue.sqlite3")
            return place

        return make
    server: PostgresServer = request.getfixturevalue("postgres")
    return lambda name: Place(tmp_path / name, server.emptied_database(), receiver.url).clear()


@pytest.fixture(params=STORES)
def make_blank(request: pytest.FixtureRequest, tmp_path: Path, receiver: Receiver) -> Make:
    """Places with a database without tables."""

    def make(name: str) -> Place:
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path}/{name}/queue.sqlite3"
        else:
            url = request.getfixturevalue("postgres").new_database("template1")
        return Place(tmp_path / name, url, receiver.url).clear()

    return make


def survive(play: processes.Play, end: processes.Play, make: Make, receiver: Receiver) -> list[str]:
    """The points that a scenario passes, each of which it has survived."""
    first = make("recorded")
    prepare(receiver)
    assert processes.run(play, first, note_in=first.folder) == 0
    assert processes.run(end, first) == 0
    assert verdict(first, receiver) == []
    passed = processes.passes(first.folder)
    wrong = {
        f"{name}#{nth}": found
        for name, times in passed.items()
        for nth in range(1, min(times, PASSES) + 1)
        if (found := _killed_at(f"{name}#{nth}", play, end, make, receiver))
    }
    assert wrong == {}
    return list(passed)


def _killed_at(
    name: str, play: processes.Play, end: processes.Play, make: Make, receiver: Receiver
) -> list[str]:
    """What is wrong after a process exited at a point."""
    for number in range(TRIES):
        place = make(f"{name.replace('#', '-')}-{number}")
        prepare(receiver)
        if processes.run(play, place, crash_at=name) == crash.EXIT_CODE:
            break
    else:
        return ["the point was not passed"]
    History(place.history).write("killed", what=name)
    if code := processes.run(end, place):
        return [f"the next process ended with {code}"]
    found = verdict(place, receiver)
    if not found:
        shutil.rmtree(place.folder)
    return found


def test_every_point_has_one_place_and_is_passed(
    tmp_path: Path, postgres: PostgresServer, receiver: Receiver
) -> None:
    there = Counter(points())
    assert set(there.values()) == {1}
    days = {
        "queue": (scenarios.play_queue, postgres.emptied_database()),
        "queue of one node": (scenarios.play_queue, f"sqlite:///{tmp_path}/one.sqlite3"),
        "files": (scenarios.play_files, ""),
        "migration": (scenarios.play_migration, postgres.new_database("template1")),
        "migration of one node": (scenarios.play_migration, f"sqlite:///{tmp_path}/two.sqlite3"),
    }
    passed: set[str] = set()
    for name, (play, url) in days.items():
        place = Place(tmp_path / name, url, receiver.url).clear()
        prepare(receiver)
        assert processes.run(play, place, note_in=place.folder) == 0
        passed |= processes.passes(place.folder).keys()
    assert passed == set(there)


def test_f03_f08_a_process_exits_at_every_point_of_the_queues_day(
    make_place: Make, receiver: Receiver
) -> None:
    passed = survive(scenarios.play_queue, scenarios.end_queue, make_place, receiver)
    assert len(passed) >= LEAST


def test_f27_a_process_exits_at_every_point_of_a_migration(make_blank: Make, receiver: Receiver) -> None:
    passed = survive(scenarios.play_migration, scenarios.end_migration, make_blank, receiver)
    assert "migrate.stepped" in passed


def test_f12_f14_a_process_exits_at_every_point_of_the_files_day(tmp_path: Path, receiver: Receiver) -> None:
    def make(name: str) -> Place:
        return Place(tmp_path / name, "", receiver.url).clear()

    passed = survive(scenarios.play_files, scenarios.end_files, make, receiver)
    assert {"save.put", "upload.joined", "cache.published", "keyring.linked", "secret.linked"} <= set(passed)
