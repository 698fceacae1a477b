"""LoRA weights beside the base weights, never fused into them.

Each layer that an adapter targets gets two buffers of a fixed total rank; an adapter is copied into a
range of ranks, and a forward adds, for each of its rows, the ranges that the row uses:

    y[row] += up · (scale[row] ⊙ (down · x[row]))

and the scaled biases of adapters that have some, so rows of one batch carry different adapters, any
number each, and the base stays as it was loaded. A scale may differ from layer to layer. Beside a
convolution, `down` is a convolution with its settings to as many channels as ranks, and `up` a 1×1 one.

For compiled and captured forwards there is a second set of buffers, the stage. The ranks that a batch uses
are copied to its beginning, when they are others than before, so that every forward reads the same places in
one of a few widths (`stage_widths`): neither a graph nor a captured forward depends on where an adapter lies.
The idea of batching adapters this way is that of Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285).
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import Condition
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from pipelines.adapters.lora import Lora, LoraLayer
from pipelines.adapters.uploading import uploaded
from schemas.errors import AssetError

Adaptable = nn.Linear | nn.Conv2d  # convolutions without groups
_LEAST_WIDTH, _WIDER = 16, 4  # ranks of the narrowest stage, and how much wider each further one is


def stage_widths(rank: int) -> tuple[int, ...]:
    """How many ranks a staged forward may read: 16, 64, 256 …, as far as `rank` goes, and `rank`."""
    widths = []
    width = _LEAST_WIDTH
    while width < rank:
        widths.append(width)
        width *= _WIDER
    return (*widths, rank) if rank else ()


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
    is_biased: bool = False
    pins: int = 0

    @property
    def rank(self) -> int:
        return self.stop - self.start

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
    """The buffers of one module, whose class becomes one that adds them to its output."""

    def __init__(self, bank: "LoraBank", name: str, module: Adaptable) -> None:
        self._bank = bank
        self._name = name
        out, *inner = module.weight.shape
        # up lies rank by rank, so that a range of ranks is in one piece
        self.down = module.weight.new_zeros(bank.rank, *inner, dtype=dtype_of(module))
        self.up = module.weight.new_zeros(bank.rank, out, dtype=dtype_of(module))
        self.staged_down = self.staged_up = self.down[:0]
        if bank.is_staged:
            self.staged_down, self.staged_up = torch.zeros_like(self.down), torch.zeros_like(self.up)
        self._biases: Mapping[int, Tensor] = {}  # [out] of adapters that have one, by their first rank
        adapted: Any = module
        kind: Any = type(module)
        adapted.lora, adapted.__class__ = self, _adapted(kind)

    def put(self, start: int, stop: int, given: LoraLayer | None) -> None:
        """Write ranks [start, stop); what is not given becomes zero."""
        # replaced, not changed: the thread that runs the modules may be reading it
        biases = {first: bias for first, bias in self._biases.items() if not start <= first < stop}
        used = start
        if given is not None:
            used += given.rank
            self.down[start:used].copy_(given.down)
            self.up[start:used].copy_(given.up.mT)
            if given.bias is not None:
                biases[start] = given.bias.to(self.up)
        if used < stop:
            self.down[used:stop] = 0
            self.up[used:stop] = 0
        self._biases = biases

    def added(self, module: Adaptable, x: Tensor, output: Tensor) -> Tensor:
        """The module's output for `x` with what the rows' adapters add."""
        staged = self._bank.staged
        if staged is not None:
            width = staged.shape[1]
            return output + _branch(module, x, self.staged_down[:width], self.staged_up[:width], staged)
        active = self._bank.active
        return output if active is None else output + self._unstaged(active, module, x)

    def _unstaged(self, active: _Active, module: Adaptable, x: Tensor) -> Tensor:
        down, up = self.down[active.start : active.stop], self.up[active.start : active.stop]
        scales = active.apart.get(self._name, active.scales)
        added = _branch(module, x, down, up, scales)
        scales = scales.to(x.dtype)
        for first, bias in self._biases.items():
            if active.start <= first < active.stop:  # all ranks of an adapter have its scale
                added += _over(module, scales[:, first - active.start, None] * bias, x)
        return added


class _Adapted(nn.Module):
    """What comes before a module's own class once a bank has a layer for it."""

    lora: _Layer

    def forward(self, x: Tensor) -> Tensor:
        return self.lora.added(cast(Adaptable, self), x, super().forward(x))


@cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of its own and no hook: torch.compile follows it, and finds the same in every block."""
    if issubclass(kind, _Adapted):  # of another bank, whose time is over
        return kind
    return type(f"Adapted{kind.__name__}", (_Adapted, kind), {})


def dtype_of(module: Adaptable) -> torch.dtype:
    """What a module computes in, which its weight may be narrower than."""
    dtype: torch.dtype = getattr(module, "computes_in", module.weight.dtype)
    return dtype


def _branch(module: Adaptable, x: Tensor, down: Tensor, up: Tensor, scales: Tensor) -> Tensor:
    over = _over(module, scales.to(x.dtype), x)
    # what overflows for an adapter that a row does not use must not become NaN in it
    inner = (_narrow(module, x, down) * over).masked_fill(over == 0, 0)
    return _widen(module, inner, up)


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
    return linear(inner, up.mT) if isinstance(module, nn.Linear) else conv2d(inner, up.mT[..., None, None])


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

    def __init__(self, targets: Mapping[str, Adaptable], rank: int, *, staged_rows: int = 0) -> None:
        """With `staged_rows` the bank has a stage for so many rows; all layers' buffers are made at once."""
        self.rank = rank
        self.is_staged = staged_rows > 0 and rank > 0 and bool(targets)
        self.active: _Active | None = None
        self.staged: Tensor | None = None  # the scales of a staged forward under way, [rows, width]
        self._targets = targets
        self._on_stage: dict[str, range] = {}  # which ranks of the stage an adapter has
        self._layers: dict[str, _Layer] = {}  # made when an adapter first targets them
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._changed = Condition()
        if self.is_staged:
            with torch.inference_mode():
                self._layers = {name: _Layer(self, name, module) for name, module in targets.items()}
                self._scales = torch.zeros(staged_rows * rank, device=self._device)

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
    def rows(self, uses: Sequence[Sequence[LoraUse]], *, staged: bool = False) -> Iterator[None]:
        """The forwards inside add these held adapters, row by row; `staged` where `can_stage` says so."""
        if staged:
            self.staged = self._staged(uses)
        else:
            self.active = self._activate(uses)
        try:
            yield
        finally:
            self.active = self.staged = None

    @contextmanager
    def staging(self, rows: int, width: int) -> Iterator[None]:
        """The forwards inside are as staged ones of `width` ranks, 0 for none, whose adapters add nothing."""
        self.staged = self._scales_of(rows, width).zero_() if width else None
        try:
            yield
        finally:
            self.staged = None

    def can_stage(self, uses: Sequence[Sequence[LoraUse]]) -> bool:
        """Whether these rows' adapters have neither biases nor scales of single layers, and rows enough."""
        used = [use for each in uses for use in each]
        if not used:
            return True
        if not self.is_staged or len(uses) * self.rank > len(self._scales):
            return False
        return not self._apart(used) and not any(self._residents[use.name].is_biased for use in used)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._targets.values())).weight.device

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
        for key, layer in layers.items():
            _check_range(layer, dtype_of(self._targets[key]))
        with torch.inference_mode():
            for key in layers.keys() - self._layers.keys():
                self._layers[key] = _Layer(self, key, self._targets[key])
            given = uploaded(layers, self._device) if layers else layers
            for key, own in self._layers.items():
                own.put(resident.start, resident.stop, given.get(key))
        resident.is_biased = any(layer.bias is not None for layer in layers.values())

    def _staged(self, uses: Sequence[Sequence[LoraUse]]) -> Tensor | None:
        """The scales of a staged forward; what it reads is on the stage then."""
        used = {
            use.name: self._residents[use.name].rank
            for each in uses
            for use in each
            if self._residents[use.name].acts
        }
        if not used:
            return None
        needed = self._width(sum(used.values()))
        if not self._on_stage.keys() >= used.keys() or self._width_on_stage > needed:
            self._set_stage(used)
        scales = torch.zeros(len(uses), self._width_on_stage)
        for row, use in ((row, use) for row, each in enumerate(uses) for use in each if use.name in used):
            ranks = self._on_stage[use.name]
            scales[row, ranks.start : ranks.stop] += use.scale
        return self._scales_of(*scales.shape).copy_(scales)

    def _scales_of(self, rows: int, width: int) -> Tensor:
        """Where the scales of such a forward lie, always the same place."""
        return self._scales[: rows * width].view(rows, width)

    @property
    def _width_on_stage(self) -> int:
        return self._width(sum(map(len, self._on_stage.values())))

    def _width(self, ranks: int) -> int:
        """The narrowest stage that holds so many ranks."""
        return next(width for width in stage_widths(self.rank) if width >= ranks)

    def _set_stage(self, names: Iterable[str]) -> None:
        """Copy the adapters' ranks to the beginning of every layer's stage, in a few calls."""
        self._on_stage = {}
        to, of, start = [], [], 0
        for name in names:
            resident = self._residents[name]
            stop = start + resident.rank
            for layer in self._layers.values():
                to += [layer.staged_down[start:stop], layer.staged_up[start:stop]]
                of += [layer.down[resident.start : resident.stop], layer.up[resident.start : resident.stop]]
            self._on_stage[name] = range(start, stop)
            start = stop
        torch._foreach_copy_(to, of)

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
