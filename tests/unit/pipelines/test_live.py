"""What tensors hold at most, counted."""

import pytest
import torch
from torch import nn

from pipelines.live import peak_bytes

KIB = 1024


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_let_go_is_not_counted_on(device: str) -> None:
    def chain() -> None:
        values = torch.zeros(KIB // 4, device=device)
        for _ in range(5):
            values = values + 1

    assert peak_bytes(chain, []) == 2 * KIB


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_and_views_are_not_counted(device: str) -> None:
    layer = nn.Linear(64, 16, bias=False, device=device)  # 4 KiB
    values = torch.zeros(4, 64, device=device)  # 1 KiB

    def forward() -> None:
        (values * 2).view(4, 64)[:2].t()
        layer(values)

    assert peak_bytes(forward, [layer]) == KIB, "the product, which is gone before the layer gives its own"


def test_attention_without_values_makes_no_matrix_of_all_by_all() -> None:
    query = torch.zeros(1, 1, 4096, 64, device="meta")

    def attend() -> None:
        nn.functional.scaled_dot_product_attention(query, query, query)

    assert peak_bytes(attend, []) == query.nbytes
