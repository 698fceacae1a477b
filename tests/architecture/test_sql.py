"""No text of a caller's becomes part of a statement: what is formatted into SQL are constants of the code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.test_imports import FILES, ROOT, name_of

RUN = {
    "execute",
    "executemany",
    "executescript",
    "exec_driver_sql",
    "text",
    "literal_column",
    "from_statement",
}
# Their values come from constants in the same file.
KNOWN = {
    ("deployments.queue.sqlite", "pragma"),
    ("deployments.queue.tables", "text"),
    ("deployments.queue.migrations.versions.v0001_tables", "table.name"),
    ("deployments.queue.migrations.versions.v0001_tables", "specification"),
}


def formatted(path: Path) -> Iterator[str]:
    """The expressions that are put into the text of a statement."""
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name not in RUN:
            continue
        for node in ast.walk(call.args[0]):
            if isinstance(node, ast.FormattedValue):
                yield ast.unparse(node.value)
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add):
                yield ast.unparse(node)
            elif isinstance(node, ast.Attribute) and node.attr in ("format", "join", "replace"):
                yield ast.unparse(node)


@pytest.mark.parametrize("path", [path for path in FILES if "queue" in path.parts], ids=name_of)
def test_t38_statements_are_made_of_constants(path: Path) -> None:
    name = name_of(path)
    assert [each for each in formatted(path) if not each.isupper() and (name, each) not in KNOWN] == []


@pytest.mark.parametrize(
    "source",
    [
        'c.execute(f"select {x}")',
        'c.execute("select %s" % x)',
        'c.execute("select " + x)',
        'text("select {}".format(x))',
        'c.exec_driver_sql(", ".join(xs))',
    ],
)
def test_t38_the_check_sees_what_it_is_for(source: str, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(source)
    assert list(formatted(path))


def test_t38_nothing_else_speaks_to_the_database() -> None:
    others = [path for path in FILES if "queue" not in path.parts and "sqlalchemy" in path.read_text()]
    assert [str(path.relative_to(ROOT)) for path in others] == []
