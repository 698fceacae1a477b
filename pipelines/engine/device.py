"""Whether a device still computes."""

import torch

from pipelines.engine.memory import ran_out


def is_lost(device: str) -> bool:
    """Whether the device does nothing more for this process, as after a forward that read where it must not.

    CUDA then answers every call with the same error, until the process has ended. Waits for what it does now.
    """
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        return not ran_out(error)
    return False
