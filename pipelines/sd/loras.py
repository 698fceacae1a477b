"""A request's LoRAs, resident beside its base model."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

from pipelines.adapters.bank import LoraUse
from pipelines.adapters.lora import Lora
from pipelines.base import Assets, named_by
from pipelines.sd.base import Base
from pipelines.sd.model import SdModel


class LoraWish(Protocol):
    """A LoRA as an endpoint's Input has it."""

    @property
    def scale(self) -> float: ...


def hold_loras(
    model: SdModel,
    base: Base,
    wishes: Sequence[LoraWish],
    assets: Assets,
    held: ExitStack,
    others: Mapping[str, Lora] | None = None,
) -> tuple[LoraUse, ...]:
    """The LoRAs of the field `loras`, and `others` at scale 1, resident until `held` is closed.

    One at scale 0 is checked and left out. Waits for room. Raises InputError.
    """
    found = dict(others or {})
    uses = [LoraUse(name) for name in found]
    for index, wish in enumerate(wishes):
        loc = ("body", "loras", index, "path")
        path = assets.weights[loc]
        with named_by(loc):
            lora = model.read_lora(base, path)
        if wish.scale:
            found[path.name] = lora
            uses.append(LoraUse(path.name, wish.scale))
    with named_by(("body", "loras")):
        held.enter_context(base.holding(found))
    return tuple(uses)
