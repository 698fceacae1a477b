"""Every row of the failure model has a test, or a sentence that says why it has none."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = range(1, 31)


def collected() -> set[str]:
    """The names of all tests."""
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


TESTS = collected()
TOLD = dict(
    re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", (ROOT / "docs/reliability.md").read_text(), re.M)
)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_failure_model_has_a_test_or_a_reason(row: int) -> None:
    told = TOLD[str(row)]
    own = {name for name in TESTS if re.search(rf"_f{row:02}_", name)}
    named = set(re.findall(r"`(test_\w+)`", told))
    assert named <= TESTS
    assert own or named or len(told.split()) > 8
    assert all(any(f"_{each}_" in name for name in TESTS) for each in re.findall(r"\bf\d\d\b", told))


def test_no_other_rows_are_told_of() -> None:
    assert {int(row) for row in TOLD} == set(ROWS)
