from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from pipelines import zoo
from pipelines.engine.engine import Engine
from pipelines.engine.sample import Sample
from pipelines.flux import flux_general_rf_inversion
from pipelines.flux.flux_dev import Pipeline
from pipelines.flux.model import FluxModel
from schemas.settings import ModelSettings
from tests.support.engine import run_to_end
from tests.support.loras import write_lora
from tests.support.rf_inversion import Files, finished, prepare, request

Denoise = Callable[..., list[Sample]]


@pytest.fixture(scope="session")
def stock(flux_folder: Path) -> Any:
    """diffusers' own pipeline on the same weights."""
    pipe = FluxPipeline.from_pretrained(flux_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def flux(flux_folder: Path) -> FluxModel:
    settings = ModelSettings(
        model=str(flux_folder),
        redux=str(zoo.locate("flux-redux", flux_folder.parent)),
        depth=str(zoo.locate("depth-anything", flux_folder.parent)),
        endpoints=("any",),
        max_sequence_length=32,
    )
    return FluxModel.load(settings, Path)


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


@pytest.fixture(scope="session")
def start() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC)


@pytest.fixture
def lora_files(flux: FluxModel, tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / f"{name}.safetensors" for name in "ab"}
    return {name: write_lora(flux, path, seed) for seed, (name, path) in enumerate(files.items())}


@pytest.fixture
def edit(flux: FluxModel) -> flux_general_rf_inversion.Pipeline:
    """rf-inversion, with no inversion known."""
    flux.noises.clear()
    return flux_general_rf_inversion.Pipeline(flux)


@pytest.fixture
def run(
    edit: flux_general_rf_inversion.Pipeline, start: Image.Image, denoise: Denoise
) -> Callable[..., Tensor]:
    """The finished latents [images, tokens, 64] of an rf-inversion with these fields; `files` are what
    it names."""

    def run(files: Files | None = None, **fields: Any) -> Tensor:
        return finished(denoise, prepare(edit, start, request(**fields), files))

    return run
