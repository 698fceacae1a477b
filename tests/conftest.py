"""What every test shares: no hub, one torch thread, the tiny model."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from pipelines import zoo


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded FLUX, built for this session."""
    return zoo.locate("flux", tmp_path_factory.mktemp("zoo"))
