"""Which test shows what a field of an endpoint does.

`@shows(ENDPOINT, "strength")` stands over a test that breaks when the field loses its meaning. A field
inside a list or an object is named by its path: "controlnets.mask_threshold".
"""

from collections.abc import Callable, Iterator
from typing import TypeVar, get_args

from pydantic import BaseModel

TestT = TypeVar("TestT", bound=Callable[..., object])

_SHOWN = "shown_fields"


def shows(endpoint_id: str, *fields: str) -> Callable[[TestT], TestT]:
    """Marks a test as the one for these fields."""

    def mark(test: TestT) -> TestT:
        setattr(test, _SHOWN, [*shown_by(test), *((endpoint_id, field) for field in fields)])
        return test

    return mark


def shown_by(test: object) -> list[tuple[str, str]]:
    """The endpoint and path of each field that a test shows."""
    found: list[tuple[str, str]] = getattr(test, _SHOWN, [])
    return found


def paths(kind: type[BaseModel]) -> Iterator[str]:
    """Every field of an Input; for one that holds objects, the fields of those."""
    for name, info in kind.model_fields.items():
        inner = [path for model in _models(info.annotation) for path in paths(model)]
        yield from (f"{name}.{path}" for path in inner) if inner else [name]


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """The kinds of objects that a field may hold, alone or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for each in get_args(annotation):
        yield from _models(each)
