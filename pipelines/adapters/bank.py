"""LoRA weights beside the base weights, never fused into them.

Each layer that an adapter targets gets two buffers of a fixed total rank; an adapter is copied into a
range of ranks, and a forward adds, for each of its rows, the ranges that the row uses:

    y[row] += up · (scale[row] ⊙ (down · x[row]))

and the scaled biases of adapters that have some, so rows of one batch carry different adapters, any
number each, and the base stays as it was loaded. A scale may differ from layer to layer. Beside a
convolution, `down` is a convolution with its settings to as many channels as ranks, and `up` a 1×1 one.
The idea of batching adapters this way is that of Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285).
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from pipelines.adapters.lora import Lora, LoraLayer
from schemas.errors import AssetError

Adaptable = nn.Linear | nn.Conv2d  # convolutions without groups


@dataclass(frozen=True, slots=True)
class LoraUse:
    """One adapter in one row: the content hash of its file, and its scale.

    `layers` are the layers with a scale of their own: {"transformer.x_embedder": 0.5}.
    """

    name: str
    scale: float = 1.0
    layers: Mapping[str, float] = field(default_factory=dict, hash=False)

    def scale_at(self, layer: str) -> float:
        return self.layers.get(layer, self.scale)


@dataclass(slots=True)
class _Resident:
    """An adapter's place: ranks [start, stop) of every layer's buffers."""

    start: int
    stop: int
    pins: int = 0

    @property
    def acts(self) -> bool:
        return self.stop > self.start


@dataclass(frozen=True, slots=True)
class _Active:
    """What the forward under way adds: ranks [start, stop) scaled by [rows, stop - start].

    `apart` has the scales of layers where they are others.
    """

    start: int
    stop: int
    scales: Tensor
    apart: Mapping[str, Tensor]


class _Layer:
    """The buffers of one module, and the hook that adds them to its output."""

    def __init__(self, bank: "LoraBank", name: str, module: Adaptable) -> None:
        self._bank = bank
        self._name = name
        out, *inner = module.weight.shape
        self._down = module.weight.new_zeros(bank.rank, *inner)
        self._up = module.weight.new_zeros(out, bank.rank)
        self._biases: Mapping[int, Tensor] = {}  # [out] of adapters that have one, by their first rank
        module.register_forward_hook(self._add)

    def put(self, start: int, stop: int, given: LoraLayer | None) -> None:
        """Write ranks [start, stop); what is not given becomes zero."""
        # replaced, not changed: the thread that runs the modules may be reading it
        biases = {first: bias for first, bias in self._biases.items() if not start <= first < stop}
        used = start
        if given is not None:
            used += given.rank
            _check_range(given, self._down.dtype)
            self._down[start:used].copy_(given.down)
            self._up[:, start:used].copy_(given.up)
            if given.bias is not None:
                biases[start] = given.bias.to(self._up)
        if used < stop:
            self._down[used:stop] = 0
            self._up[:, used:stop] = 0
        self._biases = biases

    def _add(self, module: Adaptable, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        active = self._bank.active
        if active is None:
            return None
        x: Tensor = inputs[0]
        down, up = self._down[active.start : active.stop], self._up[:, active.start : active.stop]
        scales = active.apart.get(self._name, active.scales).to(x.dtype)
        over = _over(module, scales, x)
        # what overflows for an adapter that a row does not use must not become NaN in it
        inner = (_narrow(module, x, down) * over).masked_fill_(over == 0, 0)
        added = _widen(module, inner, up)
        for first, bias in self._biases.items():
            if active.start <= first < active.stop:  # all ranks of an adapter have its scale
                added += _over(module, scales[:, first - active.start, None] * bias, x)
        return output + added


def _check_range(given: LoraLayer, dtype: torch.dtype) -> None:
    """Raise AssetError for numbers that would become infinite in `dtype`: rows of others would feel them."""
    most = torch.finfo(dtype).max
    for values in (given.down, given.up, given.bias):
        if values is None or not values.numel() or torch.finfo(values.dtype).max <= most:
            continue
        if values.abs().max() > most:
            message = f"The LoRA holds values beyond {most:g}, the most that this server's {dtype} can hold."
            raise AssetError(message, "invalid_weights")


# A linear layer has its channels last, a convolution [rows, channels, height, width].


def _narrow(module: Adaptable, x: Tensor, down: Tensor) -> Tensor:
    """From the module's input to one channel for each rank."""
    if isinstance(module, nn.Linear):
        return linear(x, down)
    inner: Tensor = module._conv_forward(x, down, None)  # by the module's stride, padding and dilation
    return inner


def _widen(module: Adaptable, inner: Tensor, up: Tensor) -> Tensor:
    """From one channel for each rank to the module's output."""
    return linear(inner, up) if isinstance(module, nn.Linear) else conv2d(inner, up[..., None, None])


def _over(module: Adaptable, values: Tensor, x: Tensor) -> Tensor:
    """A value for each row and channel [rows, channels] → to be broadcast over all places in the row."""
    if isinstance(module, nn.Linear):
        return values.view(len(values), *(1,) * (x.dim() - 2), -1)
    return values[..., None, None]


class LoraBank:
    """The adapters resident beside some modules. `rank` is their total rank, shared by all layers.

    `hold` and `release` may be called from any thread; `rows` only by the thread that runs the
    modules.
    """

    def __init__(self, targets: Mapping[str, Adaptable], rank: int) -> None:
        self.rank = rank
        self.active: _Active | None = None
        self._targets = targets
        self._layers: dict[str, _Layer] = {}  # made when an adapter first targets them
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._changed = Condition()

    def hold(self, loras: Mapping[str, Lora]) -> None:
        """Make adapters resident and keep them so until `release`; waits while others need the room.

        All of them or none, so that two waiting requests cannot block each other. Raises AssetError
        when they would not fit into an empty bank, or not into the modules' dtype.
        """
        layers = {name: self._layers_of(lora) for name, lora in loras.items()}
        ranks = {name: max((len(each.down) for each in layers[name].values()), default=0) for name in loras}
        if sum(ranks.values()) > self.rank:
            needed = sum(ranks.values())
            message = f"The LoRAs have rank {needed} together; this server holds {self.rank} at once."
            raise AssetError(message, "invalid_weights")
        with self._changed:
            while (placed := self._place(ranks)) is None:
                self._changed.wait()
            with ExitStack() as undo:
                undo.callback(self._forget, placed)  # what is written in part is not here
                for name in placed:
                    self._write(self._residents[name], layers[name])
                undo.pop_all()
            for name in loras:
                self._residents.move_to_end(name)
                self._residents[name].pins += 1

    def release(self, names: Iterable[str]) -> None:
        """Give back one `hold`."""
        with self._changed:
            for name in names:
                self._residents[name].pins -= 1
            self._changed.notify_all()

    def acting(self, uses: Iterable[LoraUse]) -> tuple[LoraUse, ...]:
        """Those of some held adapters that have layers here."""
        return tuple(use for use in uses if self._residents[use.name].acts)

    @contextmanager
    def rows(self, uses: Sequence[Sequence[LoraUse]]) -> Iterator[None]:
        """The forwards inside add these held adapters, row by row."""
        self.active = self._activate(uses)
        try:
            yield
        finally:
            self.active = None

    @property
    def names(self) -> list[str]:
        """The adapters that are here."""
        with self._changed:
            return list(self._residents)

    def check_integrity(self) -> None:
        """Raise AssertionError when places overlap or pins are off."""
        places = sorted((r.start, r.stop) for r in self._residents.values())
        assert all(stop <= start for (_, stop), (start, _) in zip(places, places[1:], strict=False))
        assert all(0 <= start <= stop <= self.rank for start, stop in places)
        assert all(resident.pins >= 0 for resident in self._residents.values())

    @property
    def pins(self) -> int:
        """How many holds are out."""
        return sum(resident.pins for resident in self._residents.values())

    def _layers_of(self, lora: Lora) -> dict[str, LoraLayer]:
        return {key: layer for key, layer in lora.layers.items() if key in self._targets}

    def _place(self, ranks: Mapping[str, int]) -> list[str] | None:
        """Give each name a place; the names that are new there, or None when others are in the way.

        Evicts idle adapters one by one, oldest first; if what stays is still in the way, all of them.
        """
        idle = [name for name, each in self._residents.items() if not each.pins and name not in ranks]
        while (placed := self._fit(ranks)) is None and idle:
            del self._residents[idle.pop(0)]
        if placed is None:
            for name in [name for name, each in self._residents.items() if not each.pins]:
                del self._residents[name]
            placed = self._fit(ranks)
        return placed

    def _fit(self, ranks: Mapping[str, int]) -> list[str] | None:
        """Put the names that are not resident into free ranges; None, and nothing put, if one is left."""
        placed: list[str] = []
        for name, rank in ranks.items():
            if name in self._residents:
                continue
            start = self._gap(rank)
            if start is None:
                for each in placed:
                    del self._residents[each]
                return None
            self._residents[name] = _Resident(start, start + rank)
            placed.append(name)
        return placed

    def _gap(self, rank: int) -> int | None:
        """The first free range of `rank` ranks."""
        start = 0
        for taken in sorted(self._residents.values(), key=lambda resident: resident.start):
            if taken.start - start >= rank:
                return start
            start = max(start, taken.stop)
        return start if self.rank - start >= rank else None

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            del self._residents[name]

    def _write(self, resident: _Resident, layers: Mapping[str, LoraLayer]) -> None:
        with torch.inference_mode():
            for key in layers.keys() - self._layers.keys():
                self._layers[key] = _Layer(self, key, self._targets[key])
            for key, layer in self._layers.items():
                layer.put(resident.start, resident.stop, layers.get(key))

    def _activate(self, uses: Sequence[Sequence[LoraUse]]) -> _Active | None:
        used = [(row, use, self._residents[use.name]) for row, each in enumerate(uses) for use in each]
        if not used:
            return None
        start = min(resident.start for _, _, resident in used)
        stop = max(resident.stop for _, _, resident in used)
        apart = self._apart([use for _, use, _ in used])
        scales = torch.zeros(1 + len(apart), len(uses), stop - start)  # the usual ones, then those apart
        for row, use, resident in used:
            each = torch.tensor([use.scale, *map(use.scale_at, apart)])
            scales[:, row, resident.start - start : resident.stop - start] += each[:, None]
        device = next(iter(self._targets.values())).weight.device
        usual, *others = scales.to(device)
        return _Active(start, stop, usual, dict(zip(apart, others, strict=True)))

    def _apart(self, uses: Sequence[LoraUse]) -> list[str]:
        """The layers where some use has another scale than elsewhere; the rest may be another bank's."""
        others = {name for use in uses for name, scale in use.layers.items() if scale != use.scale}
        return [name for name in others if name in self._layers]
