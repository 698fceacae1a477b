"""Every row of the threat model has a test, or a sentence that says why not."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = range(1, 41)

_TEST = re.compile(r"^ *(?:async )?def test_t(\d\d)_", re.MULTILINE)
_ROW = re.compile(r"^\| (\d+) \| [A-Z/]+ \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)

TESTED = {
    int(number) for path in ROOT.glob("tests/**/test_*.py") for number in _TEST.findall(path.read_text())
}
TOLD = {int(number): words for number, _, words in _ROW.findall((ROOT / "docs" / "security.md").read_text())}


def test_the_document_has_every_row_once() -> None:
    assert sorted(TOLD) == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_a_test_or_a_sentence(row: int) -> None:
    if f"see tests named t{row:02}" in TOLD[row]:
        assert row in TESTED
    else:
        assert row not in TESTED and len(TOLD[row].split()) > 5


def test_tests_are_named_by_rows_that_exist() -> None:
    assert TESTED <= set(ROWS)
