"""Which of torch's attention kernels runs: the fastest for the model's own shapes, by measurement.

torch tries its kernels in an order that holds for the whole process, and takes the first that can do what
is asked. Only that order is changed here, and none is forbidden: text encoders and VAEs, which other threads
run, still find one. The order must be set before anything is compiled: a graph keeps what it was traced with.
"""

import logging
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pipelines.speed.clock import seconds

logger = logging.getLogger(__name__)

KERNELS = MappingProxyType(
    {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
)
FUSED = ("cudnn", "flash", "efficient")  # the other one holds all weights of all queries at once
Shape = tuple[int, int, int, int]  # rows, heads, tokens, size of a head


def put_fastest_first(shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """Time the kernels on a GPU, and have torch try them in that order; elsewhere nothing is changed.

    Returns how attention of this shape is computed then: "sdpa (flash)".
    """
    heads = torch.randn(3, *shape, device=device, dtype=dtype).unbind()
    if device.type == "cuda":
        times = {name: _time(KERNELS[name], heads) for name in FUSED}
        usable = {name: time for name, time in times.items() if time is not None}
        told = {name: round(time * 1e3, 3) for name, time in usable.items()}
        logger.info("attention of %s, milliseconds: %s", shape, told)
        put_first(sorted(usable, key=lambda name: usable[name]))
    return f"sdpa ({chosen(heads)})"


def chosen(heads: Sequence[Tensor]) -> str:
    """The name of the kernel that torch takes for queries, keys and values [rows, heads, tokens, size]."""
    query, key, value = heads
    choice: int = torch._fused_sdp_choice(query, key, value)
    return next((name for name, kernel in KERNELS.items() if _number(kernel) == choice), f"kernel {choice}")


def _number(kernel: Any) -> int:
    """torch's own."""
    return int(kernel)


def put_first(names: Sequence[str]) -> None:
    """Have torch try these kernels in this order, and the others after them."""
    first = [_number(KERNELS[name]) for name in names]
    rest = [each for each in torch._C._get_sdp_priority_order() if each not in first]
    torch._C._set_sdp_priority_order([*first, *rest])


def _time(kernel: SDPBackend, heads: Sequence[Tensor]) -> float | None:
    """Seconds of one call; None where the kernel cannot do it."""
    query, key, value = heads
    try:
        with sdpa_kernel(kernel):
            return seconds(lambda: scaled_dot_product_attention(query, key, value), query.device)
    except RuntimeError as error:  # no such kernel, or no memory for it
        logger.info("attention: %s cannot run: %s", kernel, str(error)[:200])
        return None
