"""When the device's memory runs out: what the allocator keeps goes back, and the work is tried again."""

import gc
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from schemas.errors import OutOfMemory

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# How allocators without an exception class of their own begin or end their RuntimeError.
_SIGNS = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",  # of a call of CUDA's own, such as pinning
)


def with_room(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns. It is called again, once, if there was no memory for it.

    Raises OutOfMemory where there is none then either. The work must leave nothing behind when it fails.
    """
    try:
        return work(*args, **kwargs)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        logger.warning("the device's memory ran out; trying again: %s", str(error))
    give_back()  # not inside of the except: there the failure's frames still hold their tensors
    try:
        return work(*args, **kwargs)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        logger.warning("the device's memory does not suffice", exc_info=error)
    give_back()
    raise OutOfMemory


def ran_out(error: Exception) -> bool:
    """Whether an error says that memory could not be had: torch's own class, or the CPU's RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def give_back() -> None:
    """Free what nobody holds any more, on the device as well."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
