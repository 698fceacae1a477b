"""Linear layers that multiply in float8 (arXiv 2209.05433), with a scale for each row of input and weight.

    y[m, n] = x_scale[m] · w_scale[n] · Σ_k x8[m, k] · w8[n, k]  +  bias[n]

x8 = x / x_scale is rounded to float8_e4m3fn at every call, with x_scale the largest magnitude of the row
over the largest float8; the weight's were made once. What stands beside the layer, such as a LoRA, reads x
as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
LEAST = 1e-12  # of a scale: a row of zeros stays zeros
MULTIPLE = 16  # both sides of a weight, for the GPU's kernels


class Unsupported(ValueError):
    """The setting `speed.quantisation: fp8` cannot be honoured here."""


class Float8Linear(nn.Linear):
    """An nn.Linear whose weight [out, in] is float8; `quantise` makes an ordinary one into it."""

    computes_in: torch.dtype  # of input and output
    weight_scale: Tensor  # [1, out], float32

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = to_float8(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], y.shape[-1])


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] → the same in float8, and what to multiply each row by, [rows, 1] in float32."""
    scale = (rows.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=LEAST)
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


@torch.no_grad()
def quantise(module: nn.Module, blocks: tuple[str, ...]) -> int:
    """Make the linear layers inside of blocks of these classes Float8Linear; how many they are.

    Layers with a side that is no multiple of 16 stay as they are, and so do norms' modulations: they see one
    token a row. To be called before anything stands beside the layers.
    """
    layers = {
        id(layer): layer
        for block in module.modules()
        if type(block).__name__ in blocks
        for name, layer in block.named_modules()
        if type(layer) is nn.Linear and not name.startswith("norm") and _fits(layer)
    }
    for layer in layers.values():
        _narrow(layer)
    return len(layers)


def check_device(device: torch.device) -> None:
    """Raise Unsupported where such a layer does not run. On a CPU it is emulated, slowly, for tests."""
    layer = nn.Linear(MULTIPLE, MULTIPLE, device=device, dtype=torch.bfloat16)
    _narrow(layer)
    try:
        layer(torch.ones(1, MULTIPLE, device=device, dtype=torch.bfloat16))
    except RuntimeError as error:
        raise Unsupported(f"speed.quantisation: fp8 does not run on {_named(device)}: {error}") from error


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def _narrow(layer: Any) -> None:
    weight, scale = to_float8(layer.weight.detach())
    layer.computes_in = layer.weight.dtype
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_buffer("weight_scale", scale.t().contiguous())
    layer.__class__ = Float8Linear
