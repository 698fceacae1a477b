"""LoRAs: a style learned beside a frozen model, in the names that peft gives."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from pipelines.zoo.training.loop import Draw, Job, Report, fit

RANK = 16


class LowRank(nn.Module):
    """Low-rank updates of linear layers and convolutions. They act on the model as long as it lives.

    A convolution's is one to `rank` channels, and a 1×1 one from there, as LoCon's.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[str], bool], rank: int = RANK) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        torch.manual_seed(8)
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and wanted(path):
                key = path.replace(".", "/")
                out, *inner = layer.weight.shape
                self.down[key] = nn.Parameter(torch.randn(rank, *inner) / prod(inner) ** 0.5)
                self.up[key] = nn.Parameter(torch.zeros(out, rank, *(1 for _ in inner[1:])))
                layer.register_forward_hook(self._beside(key))

    def _beside(self, key: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def act(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            down, up = self.down[key], self.up[key]
            if isinstance(layer, nn.Conv2d):
                return output + conv2d(layer._conv_forward(inputs[0], down, None), up)
            return output + linear(linear(inputs[0], down), up)

        return act

    def tensors(self, component: str) -> dict[str, Tensor]:
        """Named as in a file, in float16."""
        found = {}
        for key in self.down:
            path = f"{component}.{key.replace('/', '.')}"
            found[f"{path}.lora_A.weight"] = self.down[key].detach().half().cpu().contiguous()
            found[f"{path}.lora_B.weight"] = self.up[key].detach().half().cpu().contiguous()
        return found


def wanted(path: str) -> bool:
    """Attention, feed forward, a UNet's convolutions, and where latents come in and go out."""
    parts = (".attn", ".ff.", ".proj_mlp", ".proj_out", ".proj_in", ".resnets.", "samplers.")
    ends = ("x_embedder", "proj_out", "conv_in", "conv_out")
    return path in ends or any(part in path for part in parts)


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[Draw], Tensor],
    steps: int,
    folder: Path,
    report: Report,
    device: str,
    rate: float = 0.02,
) -> LowRank:
    """Updates under which `loss`, which calls the model, falls. The model itself stays as it is."""
    model.requires_grad_(False)
    pairs = LowRank(model, wanted)
    job = Job(name, pairs, loss, steps, muon=rate, warm_up=20, hold=0.4)
    trained = fit(job, folder, report, device)
    assert isinstance(trained, LowRank)
    return trained


def save(pairs: LowRank, component: str, file: Path) -> None:
    save_file(pairs.tensors(component), file)
