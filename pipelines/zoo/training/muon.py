"""Muon for matrices and convolutions, Adam for the rest."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (https://kellerjordan.github.io/posts/muon)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"]).flatten(1)
                update = orthogonal(ahead) * max(1, ahead.shape[0] / ahead.shape[1]) ** 0.5
                weight.add_(update.view_as(weight), alpha=-group["lr"])


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """[m, n] → near the nearest matrix of singular values 1, by the quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    found = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found = found / (found.norm() + 1e-7)
    for _ in range(iterations):
        gram = found @ found.T
        found = a * found + (b * gram + c * gram @ gram) @ found
    upright: Tensor = found.T if matrix.shape[0] > matrix.shape[1] else found
    return upright


def optimisers(model: nn.Module, muon: float, adam: float) -> list[torch.optim.Optimizer]:
    """One for matrices and convolutions, one for what remains: biases, norms, embeddings."""
    tables = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    trained = [each for each in model.parameters() if each.requires_grad]
    wide = [each for each in trained if each.ndim >= 2 and id(each) not in tables]
    rest = [each for each in trained if each.ndim < 2 or id(each) in tables]
    found: list[torch.optim.Optimizer] = []
    if wide:
        found.append(Muon(wide, muon))
    if rest:
        found.append(torch.optim.Adam(rest, adam, betas=(0.9, 0.97)))
    return found
