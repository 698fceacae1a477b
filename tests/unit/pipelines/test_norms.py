"""Norms with weights of a row's own."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from pipelines.adapters.norms import Norms, Overrides

SIZE = 16


class Net(nn.Module):
    """Two norms in a row."""

    def __init__(self, eps: float | None = None) -> None:
        super().__init__()
        self.q, self.k = nn.RMSNorm(SIZE, eps), nn.RMSNorm(SIZE, eps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.k(torch.tanh(self.q(x)))
        return y


def make_net(seed: int, eps: float | None = None) -> Net:
    net = Net(eps).requires_grad_(False)
    for name, weight in weights(seed).items():
        net.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return net


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SIZE, generator=generator) for name in ("q", "k")}


def run(net: Net, norms: Norms, x: Tensor, rows: Sequence[Overrides]) -> Tensor:
    with torch.inference_mode(), norms.rows(rows):
        y: Tensor = net(x)
        return y


@pytest.fixture
def x() -> Tensor:
    """[rows, tokens, heads, size of a head]"""
    return torch.randn(3, 5, 4, SIZE, generator=torch.Generator().manual_seed(9)) / 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 1e-6, 0.1])
def test_each_row_has_its_own_weights_to_the_bit(x: Tensor, eps: float | None, dtype: torch.dtype) -> None:
    x, net = x.to(dtype), make_net(0, eps).to(dtype)
    norms = Norms({"q": net.q, "k": net.k})
    both, one = weights(1), {"k": weights(2)["k"]}

    ours = run(net, norms, x, [both, {}, one])

    assert torch.equal(ours[0], make_net(1, eps).to(dtype)(x)[0])
    assert torch.equal(ours[1], make_net(0, eps).to(dtype)(x)[1])
    mixed = make_net(0, eps)
    mixed.k.weight = nn.Parameter(one["k"], requires_grad=False)
    assert torch.equal(ours[2], mixed.to(dtype)(x)[2])


def test_the_modules_stay_as_they_were(x: Tensor) -> None:
    net = make_net(0)
    before = net(x)
    norms = Norms({"q": net.q, "k": net.k})
    run(net, norms, x, [weights(1)] * 3)
    assert torch.equal(net(x), before)
    assert torch.equal(run(net, norms, x, [{}] * 3), before)


def test_a_forward_that_fails_leaves_no_weights_behind(x: Tensor) -> None:
    net = make_net(0)
    norms = Norms({"q": net.q, "k": net.k})
    with pytest.raises(RuntimeError):
        run(net, norms, x[..., 1:], [weights(1)] * 3)
    assert torch.equal(net(x), make_net(0)(x))


def test_weights_are_placed_as_the_modules_hold_theirs_once() -> None:
    net = make_net(0).bfloat16()
    norms = Norms({"q": net.q, "k": net.k})
    placed = norms.placed(weights(1))
    assert {weight.dtype for weight in placed.values()} == {torch.bfloat16}
    again = norms.placed(placed)
    assert all(again[name] is weight for name, weight in placed.items())
