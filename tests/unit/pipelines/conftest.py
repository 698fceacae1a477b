from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxPipeline

from pipelines.engine.engine import Engine
from pipelines.engine.sample import Sample
from pipelines.flux.flux_dev import Pipeline
from pipelines.flux.model import FluxModel
from schemas.settings import ModelSettings
from tests.support.engine import run_to_end

Denoise = Callable[..., list[Sample]]


@pytest.fixture(scope="session")
def stock(flux_folder: Path) -> Any:
    """diffusers' own pipeline on the same weights."""
    pipe = FluxPipeline.from_pretrained(flux_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def flux(flux_folder: Path) -> FluxModel:
    settings = ModelSettings(model="zoo:flux", endpoints=("any",), max_sequence_length=32)
    return FluxModel.load(flux_folder, settings)


@pytest.fixture(scope="session")
def flux_dev(flux: FluxModel) -> Pipeline:
    return Pipeline(flux)


@pytest.fixture
def denoise(flux: FluxModel) -> Denoise:
    """Run samples through an engine, on this thread, to their ends."""

    def run(samples: list[Sample], budget: int = 1 << 20) -> list[Sample]:
        run_to_end(Engine(flux.predict, budget), samples)
        return samples

    return run
