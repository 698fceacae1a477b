"""Where torch.compile keeps what it has made, so that the next start finds it."""

import os
import re
from pathlib import Path

import torch

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch reads it when it compiles; Triton's cache lies below


def keep_in(folder: str, device: torch.device, model: str) -> Path:
    """Have torch keep its artefacts in a part of `folder` for this torch, device and model.

    torch itself finds them by their content; the names only keep what does not belong together apart. Where
    the variable is set already, the operator's word counts.
    """
    if given := os.environ.get(VARIABLE):
        return Path(given)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    names = (_plain(part) for part in (f"torch-{torch.__version__}", kind, model))
    path = Path(folder).expanduser().joinpath(*names)
    path.mkdir(parents=True, exist_ok=True)
    os.environ[VARIABLE] = str(path)
    return path


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "model"
