"""Every field of every endpoint has a test that shows what it does."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from pipelines.registry import ENDPOINTS
from tests.support.fields import paths, shown_by

HERE = Path(__file__).parent


def shown() -> Iterator[tuple[str, str]]:
    """What the tests beside this one, and those of the worker, are marked with."""
    folders = {"pipelines": HERE, "deployments": HERE.parent / "deployments"}
    for folder, path in folders.items():
        for file in sorted(path.glob("test_*.py")):
            module = import_module(f"tests.unit.{folder}.{file.stem}")
            for name, test in vars(module).items():
                if name.startswith("test_"):
                    yield from shown_by(test)


SHOWN = set(shown())
FIELDS = {(known.id, path) for known in ENDPOINTS.values() for path in paths(known.input_type())}


@pytest.mark.parametrize(("endpoint_id", "field"), sorted(FIELDS))
def test_a_field_has_a_test_that_shows_what_it_does(endpoint_id: str, field: str) -> None:
    assert (endpoint_id, field) in SHOWN


def test_no_test_is_marked_with_a_field_that_does_not_exist() -> None:
    assert SHOWN - FIELDS == set()
