"""Disks are full, cannot be read or synced: what was not stored was not accepted, nothing half made seen."""

from pathlib import Path

import pytest

from tests.faults import loads, processes
from tests.faults.fronts import Place, finish
from tests.faults.judging import prepare, verdict
from tests.faults.test_processes import events
from tests.support.receivers import Receiver


@pytest.fixture
def place(tmp_path: Path, receiver: Receiver) -> Place:
    prepare(receiver)
    folder = tmp_path / "place"
    return Place(folder, f"sqlite:///{folder}/disk/queue.sqlite3", receiver.url).clear()


@pytest.mark.parametrize("is_mounted", [True, False], ids=["small disk", "limit on files"])
def test_f12_a_full_disk_costs_time_only(place: Place, receiver: Receiver, is_mounted: bool) -> None:
    assert processes.run(loads.on_a_small_disk, place, is_mounted) == 0
    assert verdict(place, receiver) == []
    refused = events(place, "refused")
    assert len(refused) >= 3
    assert all(each["is_unknown"] for each in refused)


def test_f12_what_could_not_be_read_is_told_and_is_there_later(place: Place, receiver: Receiver) -> None:
    assert processes.run(loads.with_reads_failing, place) == 0
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
    unread = events(place, "unread")
    whys = [each["why"] for each in unread]
    assert any("malformed" in why for why in whys), "of the queue"
    assert any("Input/output error" in why for why in whys), "of the files"
    downloads = {tuple(each["told"]) for each in unread} - {(200, loads.DRAWN_BYTES)}
    assert {status for status, _ in downloads} == {500}, "and no answer had begun"


@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
def test_f12_what_could_not_be_synced_or_written_was_not_accepted(
    place: Place, receiver: Receiver, call: str
) -> None:
    assert processes.run(loads.with_failing, place, call) == 0
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
    assert len(events(place, "accepted")) == 5
    assert len(events(place, "refused")) == 5
