"""Small LoRAs for the embedded FLUX."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from pipelines.flux.model import FluxModel


def write_lora(flux: FluxModel, path: Path, seed: int, rank: int = 4) -> Path:
    """A LoRA on the attention of the transformer and of CLIP, as peft spells it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in flux.targets.items():
        if name.endswith(("to_q", "to_v", "q_proj")):
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 4
    save_file(tensors, path)
    return path
