"""Small requests to rf-inversion, from their fields to their finished latents."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image as Picture
from torch import Tensor

from pipelines.base import Generation
from pipelines.engine.sample import Sample
from pipelines.flux.flux_general_rf_inversion import Pipeline
from pipelines.flux.sampling import Grid
from schemas.endpoints.flux_general_rf_inversion import Input
from tests.support.assets import given

RF = "fal-ai/flux-general/rf-inversion"
URL = "http://pictures/start.png"
STEPS = 4
GRID = Grid(4, 6)  # of the start picture

Files = Mapping[str, Picture | Path | bytes]


def request(**fields: Any) -> Input:
    """A small request. Gamma and eta go in unchecked, for the schema refuses 0."""
    known = {"prompt": "a red square", "image_url": URL, "num_inference_steps": STEPS, "seed": 7}
    free: dict[str, Any] = {
        name: fields.pop(name)
        for name in ("controller_guidance_forward", "controller_guidance_reverse")
        if name in fields
    }
    return Input.model_validate(known | fields).model_copy(update=free)


def prepare(edit: Pipeline, start: Picture, wish: Input, files: Files | None = None) -> Generation:
    return edit.prepare(wish, given(wish, {URL: start, **(files or {})}), 0)


def finished(denoise: Callable[..., list[Sample]], generation: Generation) -> Tensor:
    """[images, tokens, 64]"""
    with generation.resources:
        return torch.stack([sample.latents for sample in denoise(list(generation.samples))])
