"""The many names of a layer: a family says which there are, this module looks them up.

Trainers name a layer by one of several codes' names for it, with one of several prefixes, with dots or with
underscores for dots. Every name of every layer is listed once; translating is a look-up.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipelines.adapters.lora import Destination, Translate
from pipelines.adapters.tensor_file import invalid, listed

Named = tuple[str, Destination]  # one name of a layer, and the layer

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What may stand before a component's names: with dots, and with underscores for dots."""

    dotted: tuple[str, ...]
    flat: tuple[str, ...]


def spellings(
    targets: Iterable[str],
    prefixes: Mapping[str, Prefixes],
    names: Callable[[str, list[str]], Iterable[Named]],
) -> Iterator[Named]:
    """All names of all targets, "component.path", with prefixes.

    `prefixes` are by component; `names` gives all names, without prefixes, of a component's paths.
    """
    paths: dict[str, list[str]] = {component: [] for component in prefixes}
    for target in targets:
        component, _, path = target.partition(".")
        paths[component].append(path)
    for component, before in prefixes.items():
        for name, destination in names(component, paths[component]):
            yield from ((prefix + name, destination) for prefix in before.dotted)
            yield from ((prefix + name.replace(".", "_"), destination) for prefix in before.flat)


def translator(spellings: Iterable[Named]) -> Translate:
    """The look-up of these names, with or without peft's prefix."""
    names: dict[str, Destination] = {}
    for spelling, destination in spellings:
        assert names.setdefault(spelling, destination) == destination, f"{spelling} is ambiguous"

    def translate(name: str) -> Destination | None:
        return names.get(name.removeprefix(_PEFT_PREFIX))

    return translate


def layer_scales(wish: Mapping[str, float], spellings: Iterable[Named]) -> Mapping[str, float]:
    """The scale of each target that a request's map of names to scales sets.

    A name is any spelling of a layer, or the beginning of some, up to a dot: "transformer_blocks.0.attn",
    "double_blocks.0", "diffusion_model.input_blocks". Where several fit, the one that fits the fewest
    layers counts, of those the longest. Raises AssetError listing the names that fit none.
    """
    fitting: dict[str, set[str]] = {name.removeprefix(_PEFT_PREFIX): set() for name in wish}
    for spelling, destination in spellings:
        for beginning in beginnings(spelling):
            if beginning in fitting:
                fitting[beginning].update(destination.targets)
    layers = {name: fitting[name.removeprefix(_PEFT_PREFIX)] for name in wish}
    if unknown := [name for name in wish if not layers[name]]:
        raise invalid(f"The scale names layers that this model does not have: {listed(unknown)}.")
    scales: dict[str, float] = {}
    for name in sorted(wish, key=lambda name: (-len(layers[name]), len(name))):
        scales |= dict.fromkeys(layers[name], wish[name])
    return scales


def beginnings(name: str) -> Iterator[str]:
    """ "a.b.c", "a.b", "a"."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def with_or_without(wrapper: str, path: str) -> str:
    """The path without the wrapper module it begins with, or with it where it does not."""
    inner = path.removeprefix(f"{wrapper}.")
    return inner if inner != path else f"{wrapper}.{path}"
