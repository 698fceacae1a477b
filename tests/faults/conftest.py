"""Places on every store, and a receiver of webhooks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import processes
from tests.faults.fronts import Place
from tests.faults.judging import prepare
from tests.support.receivers import Receiver, receiving

SCALE = int(os.environ.get("DARKROOM_FAULTS", "1"))  # 1 in `make test`, more in `make faults`


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    processes.kill_all()


@pytest.fixture
def scale() -> int:
    """How much of everything: 1 in the short form."""
    return SCALE


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def place(queue_url: str, tmp_path: Path, receiver: Receiver) -> Place:
    """An empty queue on every store, and a folder."""
    prepare(receiver)
    return Place(tmp_path / "place", queue_url, receiver.url).clear()
