"""What a server is installed from: exact versions, each file by its hash."""

import re

import pytest

from tests.architecture.test_imports import ROOT

_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+)", re.MULTILINE)


def pins(name: str) -> dict[str, str]:
    found = _PIN.findall((ROOT / name).read_text())
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


LOCK, CONSTRAINTS = pins("requirements.lock"), pins("constraints.txt")


def entries() -> list[str]:
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_t35_every_line_of_the_lock_has_hashes() -> None:
    assert len(entries()) == len(LOCK) >= 100
    for entry in entries():
        assert re.fullmatch(
            r"[A-Za-z0-9._\[\]-]+==\S+( ; [^-]+)?(\s+--hash=sha256:[0-9a-f]{64})+\s*", entry
        ), entry


def test_t35_lock_and_constraints_agree() -> None:
    assert LOCK.items() - CONSTRAINTS.items() == set()


def test_t35_the_lock_leaves_torch_to_whoever_knows_the_card() -> None:
    assert [name for name in LOCK if name.startswith(("torch", "nvidia", "cuda", "triton"))] == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "requirements.lock", "Makefile"])
def test_t35_nothing_names_where_packages_come_from(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host|files\.pythonhosted", text)


def test_t35_what_pyproject_asks_for_is_locked() -> None:
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[0]
    asked = re.findall(r'^    "([A-Za-z0-9_-]+)[^"]*",?', project, re.MULTILINE)
    assert len(asked) >= 15
    assert [name for name in asked if re.sub(r"[-_.]+", "-", name).lower() not in LOCK] == []
