"""Random EasyControl files, named as the authors' trainer names them.

The names stand here a second time on purpose: they are what the files of others look like.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK = 4

Shapes = Mapping[str, tuple[int, ...]]


def shapes(doubles: int, singles: int, width: int, rank: int = RANK) -> dict[str, tuple[int, ...]]:
    """Every key of a file with its tensor's shape."""
    return {
        f"{layer}.{role}.weight": shape
        for layer in layers(doubles, singles)
        for role, shape in (("down", (rank, width)), ("up", (width, rank)))
    }


def layers(doubles: int, singles: int) -> Iterator[str]:
    for number in range(doubles):
        for layer in ("q", "k", "v", "proj"):
            yield f"transformer_blocks.{number}.attn.processor.{layer}_loras.0"
    for number in range(singles):
        for layer in ("q", "k", "v"):
            yield f"single_transformer_blocks.{number}.attn.processor.{layer}_loras.0"


def draw(seed: int = 0, rank: int = RANK, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random EasyControl for the embedded FLUX: 2 double blocks, 2 single ones, 32 wide."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return {
        key: (torch.randn(shape, generator=generator) / math.sqrt(shape[1])).to(dtype)
        for key, shape in shapes(2, 2, 32, rank).items()
    }


def write(path: Path, tensors: Mapping[str, Tensor], prefix: str = "") -> Path:
    save_file({prefix + key: tensor.clone() for key, tensor in tensors.items()}, path)
    return path


def write_zeros(path: Path, shapes: Shapes) -> Path:
    """A file of zeros in bfloat16 that takes hardly any room on the disk, however large it is."""
    entries: dict[str, object] = {}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path
