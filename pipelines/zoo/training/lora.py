"""LoRAs: a style learned beside a frozen model, in the names that peft gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.zoo.training.loop import Draw, Job, Report, fit

RANK = 16


class LowRank(nn.Module):
    """Low-rank updates of linear layers. They act on the model as long as it lives."""

    def __init__(self, model: nn.Module, wanted: Callable[[str], bool], rank: int = RANK) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        torch.manual_seed(8)
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and wanted(path):
                key = path.replace(".", "/")
                self.down[key] = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
                self.up[key] = nn.Parameter(torch.zeros(layer.out_features, rank))
                layer.register_forward_hook(self._beside(key))

    def _beside(self, key: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def act(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            found: Tensor = output + inputs[0] @ self.down[key].T @ self.up[key].T
            return found

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
    """Attention, feed forward, and where latents come in and go out."""
    parts = (".attn", ".ff.", ".proj_mlp", ".proj_out", ".proj_in")
    return path in ("x_embedder", "proj_out") or any(part in path for part in parts)


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[Draw], Tensor],
    steps: int,
    folder: Path,
    report: Report,
    device: str,
) -> LowRank:
    """Updates under which `loss`, which calls the model, falls. The model itself stays as it is."""
    model.requires_grad_(False)
    pairs = LowRank(model, wanted)
    job = Job(name, pairs, loss, steps, muon=0.02, warm_up=20, hold=0.4)
    trained = fit(job, folder, report, device)
    assert isinstance(trained, LowRank)
    return trained


def save(pairs: LowRank, component: str, file: Path) -> None:
    save_file(pairs.tensors(component), file)
