"""How long a call takes on a device."""

import time
from collections.abc import Callable

import torch

CALLS, WARM_UPS = 3, 1


def seconds(call: Callable[[], object], device: torch.device, calls: int = CALLS) -> float:
    """Seconds of one call and of the device's work for it: the mean of several, after a warm-up."""
    for _ in range(WARM_UPS):
        call()
    wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    wait(device)
    return (time.perf_counter() - began) / calls


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
