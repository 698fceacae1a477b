"""LoRA files of any family: read, checked against the model's layers, and brought to one form.

A LoRA (Hu et al. 2021, arXiv 2106.09685) adds (alpha / rank) · up @ down to a linear layer's weight.
Trainers name the layers in many ways and fuse some of them; the family's translator knows the names,
this module knows everything else.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipelines.adapters import tensor_file
from pipelines.adapters.tensor_file import TensorFile, check_finite, invalid, listed

MAX_RANK = 512


@dataclass(frozen=True, slots=True, eq=False)
class LoraLayer:
    """What is added to one layer: up @ down, alpha included.

    down [rank, in] and up [out, rank] are on the CPU in float32 or narrower, not always the same dtype.
    Layers that were fused in the file may share one `down`.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """A LoRA's layers by the module they belong to, such as "transformer.x_embedder"."""

    layers: Mapping[str, LoraLayer]

    @property
    def nbytes(self) -> int:
        """As if no layers shared a tensor."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def max_rank(self) -> int:
        return max(layer.rank for layer in self.layers.values())


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a layer of a file belongs.

    The rows of its `up` are those of `targets`, one after another; with `halves_swapped` the second half
    of the rows comes first here.
    """

    targets: tuple[str, ...]
    halves_swapped: bool = False


# A family's translator: from a layer's name in the file, which is its key without ".lora_A.weight",
# ".alpha" and the like, to its destination in the model; None for a name it does not know.
Translate = Callable[[str], Destination | None]


def load(path: Path, translate: Translate, shapes: Mapping[str, tuple[int, int]]) -> Lora:
    """Read a LoRA; `shapes` maps every layer that may carry one to its weight's (out, in).

    All or nothing: each key of the file must belong to a layer and fit it. Raises AssetError
    ("invalid_weights") naming the keys that do not.
    """
    file = tensor_file.read(path)
    _refuse_other_kinds(file)
    found = _find(file, translate)
    for each in found:
        _check_shapes(each, file, shapes)
    notes = _adapter_notes(file)
    tensors = file.load()
    return Lora({name: layer for each in found for name, layer in _layers(each, tensors, notes, shapes)})


_OTHER_KINDS = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoHa": re.compile(r"hada_w\d|hada_t\d"),
    "LoKr": re.compile(r"lokr_w\d|lokr_t\d"),
    "OFT": re.compile(r"\.oft_"),
    "a LoRA with Tucker decomposition": re.compile(r"lora_mid\."),
    "a LoRA with biases": re.compile(r"(lora_(A|B|up|down)(\.\w+)?|\.up|\.down)\.bias$"),
    "a LoRA with weight differences": re.compile(r"\.diff(_b)?$"),
}


def _refuse_other_kinds(file: TensorFile) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        keys = [key for key in file.shapes if pattern.search(key)]
        if keys:
            raise invalid(f"The file is {kind}, which is not supported: {listed(keys)}.")


@dataclass(frozen=True, slots=True)
class _Found:
    """A layer of the file: where it belongs, and its keys by role: down, up, perhaps alpha."""

    name: str
    destination: Destination
    keys: dict[str, str] = field(default_factory=dict)


# After the layer's name. Between lora_A and weight, peft may put the adapter's name.
_ROLES = {
    "down": re.compile(r"\.(lora_A(\.\w+)?|lora_down|down)\.weight$"),
    "up": re.compile(r"\.(lora_B(\.\w+)?|lora_up|up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
}


def _find(file: TensorFile, translate: Translate) -> list[_Found]:
    found: dict[str, _Found] = {}
    unknown = []
    for key in file.shapes:
        name, role = _part(key)
        destination = translate(name) if role else None
        if destination is None:
            unknown.append(key)
            continue
        layer = found.setdefault(name, _Found(name, destination))
        if role in layer.keys:
            raise invalid(f"The LoRA has {name} twice: {layer.keys[role]} and {key}.")
        layer.keys[role] = key
    if not found:
        raise invalid(
            f"The file is not a LoRA for this model, which has none of its keys: {listed(unknown)}."
        )
    if unknown:
        raise invalid(f"The LoRA fits this model only partly; the model has no place for {listed(unknown)}.")
    _check_complete(list(found.values()))
    return list(found.values())


def _part(key: str) -> tuple[str, str]:
    """The layer's name and the key's role in it, "" for none."""
    for role, pattern in _ROLES.items():
        if match := pattern.search(key):
            return key[: match.start()], role
    return key, ""


def _check_complete(found: list[_Found]) -> None:
    alone = [key for each in found for key in each.keys.values() if not {"down", "up"} <= each.keys.keys()]
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


def _check_shapes(found: _Found, file: TensorFile, shapes: Mapping[str, tuple[int, int]]) -> None:
    targets = found.destination.targets
    rows = sum(shapes[target][0] for target in targets)
    columns = shapes[targets[0]][1]
    down, up = found.keys["down"], found.keys["up"]
    rank = file.shapes[down][0] if file.shapes[down] else 0
    if rank > MAX_RANK:
        raise invalid(f"{down} has rank {rank}; at most {MAX_RANK} is accepted.")
    for key, expected in ((down, (rank, columns)), (up, (rows, rank))):
        shape = file.shapes[key]
        if shape not in (expected, (*expected, 1, 1)):  # as a matrix, or as a 1×1 convolution
            raise invalid(
                f"The LoRA was trained on another model: {key} has the shape {list(shape)} where "
                f"{list(expected)} is expected."
            )
    alpha = found.keys.get("alpha")
    if alpha and file.shapes[alpha] not in ((), (1,)):
        raise invalid(f"{alpha} has the shape {list(file.shapes[alpha])} where a single number is expected.")


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
    found: _Found,
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, object],
    shapes: Mapping[str, tuple[int, int]],
) -> Iterator[tuple[str, LoraLayer]]:
    down_key, up_key = found.keys["down"], found.keys["up"]
    targets = found.destination.targets
    down, up = _matrix(tensors[down_key]), _matrix(tensors[up_key])
    if "alpha" in found.keys:
        scale = tensors[found.keys["alpha"]].item() / len(down)
    else:
        scale = _noted_scale(notes, targets[0].split(".")[0], len(down))
    if scale != 1:
        up = up.float() * scale  # half precision would lose the small values
    check_finite({down_key: down, up_key: up})
    if found.destination.halves_swapped:
        up = torch.cat(up.chunk(2)[::-1])
    parts = up.split_with_sizes([shapes[target][0] for target in targets])
    for target, part in zip(targets, parts, strict=True):
        yield target, _without_idle_ranks(down, part) if len(targets) > 1 else LoraLayer(down, part)


def _matrix(tensor: Tensor) -> Tensor:
    """As [rows, columns] without the axes of a 1×1 convolution, at most 32 bits a value."""
    return tensor.flatten(1).to(torch.float32 if tensor.dtype == torch.float64 else tensor.dtype)


def _without_idle_ranks(down: Tensor, up: Tensor) -> LoraLayer:
    """One target's part of a fused layer.

    Trainers that keep the parts apart inside a fused layer write a block-diagonal `up`: each part uses
    its own ranks and has zeros for the others', which are dropped here. The product stays the same.
    """
    used = up.any(dim=0)
    if used.all() or not used.any():
        return LoraLayer(down, up)
    return LoraLayer(down[used], up[:, used])
