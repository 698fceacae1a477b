"""LoRA files of any family: read, checked against the model's layers, and brought to one form.

A LoRA (Hu et al. 2021, arXiv 2106.09685) adds (alpha / rank) · up @ down to a linear layer's weight,
and perhaps (alpha / rank) · a bias to its output, as peft does. To a convolution it adds one to `rank`
channels, and a 1×1 one from there to all channels, as LoCon does. A control LoRA, such as Black Forest
Labs' for canny edges and depth, also widens the layer that reads the latents, so that it reads a control
image beside them, and replaces the weights of norms.
Trainers name the layers in many ways and fuse some of them; the family's translator knows the names,
this module knows everything else.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import linear

from pipelines.adapters import tensor_file
from pipelines.adapters.tensor_file import TensorFile, check_finite, invalid, listed

MAX_RANK = 512


@dataclass(frozen=True, slots=True, eq=False)
class LoraLayer:
    """What is added to one layer: up @ down and perhaps a bias, alpha included.

    down [rank, in], up [out, rank] and bias [out] are on the CPU in float32 or narrower, not always the
    same dtype. A convolution's down is [rank, in, height, width], like the layer's own kernel.
    Layers that were fused in the file may share one `down`.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A LoRA's layers by the module they belong to, such as "transformer.x_embedder".

    A control LoRA's wide layer is in `layers` as far as it reads the latents; `control` is its other half,
    which reads the control image and has no bias. `norms` replace the weights of norms, whatever the scale.
    """

    layers: Mapping[str, LoraLayer]
    control: LoraLayer | None = None
    norms: Mapping[str, Tensor] = field(default_factory=dict)  # [size], by the norm's path

    def control_embedding(self, tokens: Tensor, scale: float) -> Tensor:
        """What the control image's tokens [tokens, in] add to the wide layer's output: [tokens, out].

        In the tokens' dtype, on their device. It is the same at every step.
        """
        assert self.control is not None, "the LoRA reads no control image"
        down, up = self.control.down.to(tokens), self.control.up.to(tokens)
        return linear(linear(tokens, down) * scale, up)

    def pinned(self, pin: Callable[[Tensor], Tensor] = Tensor.pin_memory) -> "Lora":
        """The same in one block of page-locked memory, from where a GPU fetches it at full speed and at once.

        Tensors that layers share stay shared.
        """
        places, size = _places(self._tensors())
        block = pin(torch.empty(size, dtype=torch.uint8))
        known: dict[int, Tensor] = {}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in known:
                start = places[id(tensor)]
                room = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                known[id(tensor)] = room.copy_(tensor)
            return known[id(tensor)]

        def layer(each: LoraLayer) -> LoraLayer:
            return LoraLayer(
                moved(each.down), moved(each.up), None if each.bias is None else moved(each.bias)
            )

        return Lora(
            {name: layer(each) for name, each in self.layers.items()},
            layer(self.control) if self.control else None,
            {name: moved(weight) for name, weight in self.norms.items()},
        )

    def _tensors(self) -> Iterator[Tensor]:
        for layer in (*self.layers.values(), *([self.control] if self.control else [])):
            yield from (each for each in (layer.down, layer.up, layer.bias) if each is not None)
        yield from self.norms.values()

    @property
    def nbytes(self) -> int:
        """As if no layers shared a tensor."""
        layers = [*self.layers.values(), *([self.control] if self.control else [])]
        return sum(each.nbytes for each in layers) + sum(weight.nbytes for weight in self.norms.values())

    @property
    def max_rank(self) -> int:
        return max(layer.rank for layer in self.layers.values())


_ALIGNED = 256  # bytes


def _places(tensors: Iterable[Tensor]) -> tuple[dict[int, int], int]:
    """Where each tensor begins in a block of memory, by its id, and how large that is; in bytes."""
    places: dict[int, int] = {}
    size = 0
    for tensor in tensors:
        if id(tensor) not in places:
            places[id(tensor)] = size
            size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    return places, size


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a layer or a norm of a file belongs.

    The rows of a layer's `up` are those of `targets`, one after another; with `halves_swapped` the second
    half of the rows comes first here. A norm has one target.
    """

    targets: tuple[str, ...]
    halves_swapped: bool = False


# A family's translator: from a name in the file, which is a key without ".lora_A.weight", ".alpha",
# ".scale" and the like, to its destination in the model; None for a name it does not know.
Translate = Callable[[str], Destination | None]

# Every layer that may carry a LoRA, with the shape of its weight: (out, in), or (out, in, height, width) of a
# convolution's kernel.
Shapes = Mapping[str, tuple[int, ...]]
_NO_NORMS: Mapping[str, int] = MappingProxyType({})


def load(
    path: Path,
    translate: Translate,
    shapes: Shapes,
    *,
    norms: Mapping[str, int] = _NO_NORMS,
    wide: str | None = None,
) -> Lora:
    """Read a LoRA for the layers of these shapes.

    `norms` maps the norms that it may replace to the sizes of their weights; `wide` is the layer that may
    read a control image of as many channels beside its own input.
    All or nothing: each key of the file must belong to a layer or a norm and fit it. Raises AssetError
    ("invalid_weights") naming the keys that do not.
    """
    file = tensor_file.read(path)
    _refuse_other_kinds(file)
    found_layers, found_norms = _find(file, translate, norms)
    for each in found_layers:
        _check_shapes(each, file, shapes, wide)
    for each in found_norms:
        _check_norm(each, file, norms)
    notes = _adapter_notes(file)
    tensors = file.load()
    layers = {name: layer for each in found_layers for name, layer in _layers(each, tensors, notes, shapes)}
    control = None
    if wide in layers and layers[wide].down.shape[1] > shapes[wide][1]:
        layers[wide], control = _halves(layers[wide])
    return Lora(layers, control, dict(_norm(each, tensors) for each in found_norms))


_OTHER_KINDS = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoHa": re.compile(r"hada_w\d|hada_t\d"),
    "LoKr": re.compile(r"lokr_w\d|lokr_t\d"),
    "OFT": re.compile(r"\.oft_"),
    "a LoRA with Tucker decomposition": re.compile(r"lora_mid\."),
    "a LoRA with biases on its down side": re.compile(r"(lora_A(\.\w+)?|lora_down|\.down)\.bias$"),
    "a LoRA with weight differences": re.compile(r"\.diff(_b)?$"),
}


def _refuse_other_kinds(file: TensorFile) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        keys = [key for key in file.shapes if pattern.search(key)]
        if keys:
            raise invalid(f"The file is {kind}, which is not supported: {listed(keys)}.")


@dataclass(frozen=True, slots=True)
class _Found:
    """A layer of the file, or a norm: where it belongs, and its keys by role.

    A layer has down and up, perhaps alpha and bias; a norm has norm.
    """

    name: str
    destination: Destination
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return "norm" in self.keys or {"down", "up"} <= self.keys.keys()


# After the name. Between lora_A and weight, peft may put the adapter's name; before down, diffusers put the
# LoRA's until 2023. The first that fits counts.
_DOWN = r"\.(lora_A(\.\w+)?|lora_down|((lora|lora_linear_layer)\.)?down)"
_UP = r"\.(lora_B(\.\w+)?|lora_up|((lora|lora_linear_layer)\.)?up)"
_ROLES = {
    "down": re.compile(_DOWN + r"\.weight$"),
    "up": re.compile(_UP + r"\.weight$"),
    "bias": re.compile(_UP + r"\.bias$"),
    "alpha": re.compile(r"\.alpha$"),
    "norm": re.compile(r"\.(weight|scale)$"),
}


def _find(
    file: TensorFile, translate: Translate, norms: Mapping[str, int]
) -> tuple[list[_Found], list[_Found]]:
    """The file's layers and its norms."""
    found: dict[str, _Found] = {}
    unknown = []
    for key in file.shapes:
        name, role = _part(key)
        destination = translate(name) if role else None
        if destination is None or (destination.targets[0] in norms) != (role == "norm"):
            unknown.append(key)
            continue
        layer = found.setdefault(name, _Found(name, destination))
        if role in layer.keys:
            raise invalid(f"The LoRA has {name} twice: {layer.keys[role]} and {key}.")
        layer.keys[role] = key
    layers = [each for each in found.values() if "norm" not in each.keys]
    if not layers:
        keys = unknown or file.shapes  # norms alone are no LoRA
        raise invalid(f"The file is not a LoRA for this model, which has none of its keys: {listed(keys)}.")
    if unknown:
        raise invalid(f"The LoRA fits this model only partly; the model has no place for {listed(unknown)}.")
    _check_complete(list(found.values()))
    return layers, [each for each in found.values() if "norm" in each.keys]


def _part(key: str) -> tuple[str, str]:
    """The layer's or the norm's name and the key's role in it, "" for none."""
    for role, pattern in _ROLES.items():
        if match := pattern.search(key):
            return key[: match.start()], role
    return key, ""


def _check_complete(found: list[_Found]) -> None:
    alone = [key for each in found for key in each.keys.values() if not each.is_whole]
    if alone:
        raise invalid(
            f"The LoRA has only a part of some layers, down without up or the like: {listed(alone)}."
        )
    owners: dict[str, str] = {}
    for each in found:
        for target in each.destination.targets:
            if target in owners:
                raise invalid(f"The LoRA has {target} twice: {owners[target]} and {each.name}.")
            owners[target] = each.name


def _check_shapes(found: _Found, file: TensorFile, shapes: Shapes, wide: str | None) -> None:
    targets = found.destination.targets
    rows = sum(shapes[target][0] for target in targets)
    columns, *kernel = shapes[targets[0]][1:]
    down, up = found.keys["down"], found.keys["up"]
    rank = file.shapes[down][0] if file.shapes[down] else 0
    if rank > MAX_RANK:
        raise invalid(f"{down} has rank {rank}; at most {MAX_RANK} is accepted.")
    if targets == (wide,) and file.shapes[down][1:2] == (2 * columns,):
        columns *= 2
    for key, expected in ((down, (rank, columns, *kernel)), (up, (rows, rank))):
        _check_shape(key, file.shapes[key], *_forms(expected))
    if bias := found.keys.get("bias"):
        _check_shape(bias, file.shapes[bias], (rows,))
    alpha = found.keys.get("alpha")
    if alpha and file.shapes[alpha] not in ((), (1,)):
        raise invalid(f"{alpha} has the shape {list(file.shapes[alpha])} where a single number is expected.")


def _check_norm(found: _Found, file: TensorFile, norms: Mapping[str, int]) -> None:
    key = found.keys["norm"]
    _check_shape(key, file.shapes[key], (norms[found.destination.targets[0]],))


def _forms(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """How a weight may be stored: trainers write matrices as 1×1 convolutions, and the reverse."""
    matrix, kernel = shape[:2], shape[2:]
    return (shape, matrix, (*matrix, 1, 1)) if kernel in ((), (1, 1)) else (shape,)


def _check_shape(key: str, shape: tuple[int, ...], *expected: tuple[int, ...]) -> None:
    if shape not in expected:
        raise invalid(
            f"The LoRA was trained on another model: {key} has the shape {list(shape)} where "
            f"{list(expected[0])} is expected."
        )


def _adapter_notes(file: TensorFile) -> Mapping[str, object]:
    """What diffusers notes beside the weights it saves: peft's settings, as "transformer.lora_alpha"."""
    text = file.notes.get("lora_adapter_metadata", "{}")
    try:
        notes: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid("The LoRA's metadata, lora_adapter_metadata, is not JSON.") from error
    if not isinstance(notes, dict):
        raise invalid("The LoRA's metadata, lora_adapter_metadata, is not an object.")
    patterns = [key for key, value in notes.items() if key.endswith("alpha_pattern") and value]
    if patterns:
        raise invalid(
            f"The LoRA's metadata sets alphas by pattern, which is not supported: {listed(patterns)}."
        )
    return notes


def _noted_scale(notes: Mapping[str, object], component: str, rank: int) -> float:
    """alpha / rank by the notes, alpha / √rank for rank-stabilised LoRA; 1 where they are silent."""
    alpha, stabilised = (
        notes.get(f"{component}.{setting}", notes.get(setting)) for setting in ("lora_alpha", "use_rslora")
    )
    if alpha is None:
        return 1.0
    if not isinstance(alpha, int | float) or not abs(alpha) < 1e6:
        raise invalid("The LoRA's metadata has a lora_alpha that is not a usual number.")
    return alpha / (math.sqrt(rank) if stabilised else rank)


def _layers(
    found: _Found, tensors: Mapping[str, Tensor], notes: Mapping[str, object], shapes: Shapes
) -> Iterator[tuple[str, LoraLayer]]:
    targets = found.destination.targets
    layer = _scaled(found, tensors, notes, kernel=shapes[targets[0]][2:])
    check_finite({key: getattr(layer, role) for role, key in found.keys.items() if role != "alpha"})
    if found.destination.halves_swapped:
        bias = None if layer.bias is None else _swapped(layer.bias)
        layer = LoraLayer(layer.down, _swapped(layer.up), bias)
    rows = [shapes[target][0] for target in targets]
    ups = layer.up.split_with_sizes(rows)
    biases = [None] * len(rows) if layer.bias is None else layer.bias.split_with_sizes(rows)
    for target, up, bias in zip(targets, ups, biases, strict=True):
        part = LoraLayer(layer.down, up, bias)
        yield target, _without_idle_ranks(part) if len(targets) > 1 else part


def _scaled(
    found: _Found, tensors: Mapping[str, Tensor], notes: Mapping[str, object], kernel: tuple[int, ...]
) -> LoraLayer:
    """The layer as it is in the file, alpha included: peft scales the bias like the rest."""
    down, up = (_narrow(tensors[found.keys[role]]) for role in ("down", "up"))
    down, up = down.reshape(len(down), -1, *kernel), up.flatten(1)
    bias = _narrow(tensors[found.keys["bias"]]) if "bias" in found.keys else None
    if "alpha" in found.keys:
        scale = tensors[found.keys["alpha"]].item() / len(down)
    else:
        scale = _noted_scale(notes, found.destination.targets[0].split(".")[0], len(down))
    if scale == 1:
        return LoraLayer(down, up, bias)
    # half precision would lose the small values
    return LoraLayer(down, up.float() * scale, None if bias is None else bias.float() * scale)


def _norm(found: _Found, tensors: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    key = found.keys["norm"]
    weight = _narrow(tensors[key])
    check_finite({key: weight})
    return found.destination.targets[0], weight


def _narrow(tensor: Tensor) -> Tensor:
    """At most 32 bits a value."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _without_idle_ranks(layer: LoraLayer) -> LoraLayer:
    """One target's part of a fused layer.

    Trainers that keep the parts apart inside a fused layer write a block-diagonal `up`: each part uses
    its own ranks and has zeros for the others', which are dropped here. The product stays the same.
    """
    used = layer.up.any(dim=0)
    if used.all() or not used.any():
        return layer
    return LoraLayer(layer.down[used], layer.up[:, used], layer.bias)


def _halves(wide: LoraLayer) -> tuple[LoraLayer, LoraLayer]:
    """A control LoRA's wide layer: what reads the latents, and what reads the control image."""
    latents, control = wide.down.chunk(2, dim=1)
    return LoraLayer(latents, wide.up, wide.bias), LoraLayer(control, wide.up)
