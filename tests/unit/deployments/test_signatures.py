"""The secrets of this server's own words."""

import os
import stat
from pathlib import Path

import pytest

from deployments.files.signatures import SECRET_BYTES, load_secret


def test_a_secret_is_drawn_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    drawn = load_secret(path)
    assert len(drawn) == SECRET_BYTES and load_secret(path) == drawn
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*tmp_path.iterdir()] == [path]


def test_of_two_that_draw_at_once_the_first_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "secret", os.link

    def another_was_first(drawn: Path, to: Path) -> None:
        to.write_bytes(b"the other's")
        link(drawn, to)

    monkeypatch.setattr(os, "link", another_was_first)
    assert load_secret(path) == b"the other's"
    assert [*tmp_path.iterdir()] == [path]
