"""The three endpoints on the trained embedded FLUX, many requests at once."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines import zoo
from pipelines.flux import flux_dev, flux_general_rf_inversion, flux_lora_image_to_image
from pipelines.flux.model import FluxModel
from pipelines.zoo.world import COLOURS, SIDE_PX, Pixels
from schemas.endpoints import flux_dev as dev
from schemas.endpoints import flux_general_rf_inversion as inversion
from schemas.endpoints import flux_lora_image_to_image as remake
from schemas.settings import ModelSettings
from tests.support.world import SIZE, START, draw, folder, started

STEPS = 16
# An inversion of a blank picture under these fields draws from the seed and the prompt alone.
_FORGOTTEN: dict[str, Any] = {
    "reverse_guidance_end": 1,
    "controller_guidance_reverse": 0.01,
    "controller_guidance_forward": 1.0,
}


@cache
def model(max_sequence_length: int = 32) -> FluxModel:
    known = {"model": "zoo:flux-world", "endpoints": ("any",), "max_sequence_length": max_sequence_length}
    if "flux-world-redux" in zoo.trained():
        known["redux"] = "zoo:flux-world-redux"
    return FluxModel.load(ModelSettings.model_validate(known), folder)


def drawn(prompts: Sequence[str], seed: int, max_sequence_length: int = 32, **fields: Any) -> list[Pixels]:
    """From text alone; picture i has seed + i."""
    known = {"image_size": SIZE, "num_inference_steps": STEPS}
    wishes = [
        dev.Input.model_validate(known | fields | {"prompt": prompt, "seed": seed + number})
        for number, prompt in enumerate(prompts)
    ]
    return draw(flux_dev.Pipeline(model(max_sequence_length)), wishes)


def remade(
    prompts: Sequence[str], starts: Sequence[Pixels], seed: int, lora: Path | None = None, **fields: Any
) -> list[Pixels]:
    """From pictures, with a LoRA that `fields` may name "style"."""
    known = {"image_url": START, "num_inference_steps": STEPS}
    wishes = [
        remake.Input.model_validate(known | fields | {"prompt": prompt, "seed": seed + number})
        for number, prompt in enumerate(prompts)
    ]
    files = started(starts, style=lora)
    return draw(flux_lora_image_to_image.Pipeline(model()), wishes, *files)


def inverted(prompts: Sequence[str], starts: Sequence[Pixels], seed: int, **fields: Any) -> list[Pixels]:
    """Edited by inversion."""
    return _edited(prompts, started(starts), seed, fields)


def shown(prompt: str, pictures: Sequence[Pixels], seed: int, **fields: Any) -> list[Pixels]:
    """From a prompt and pictures, which `fields` name "like"; the start is blank and forgotten."""
    files = [_blank() | {"like": Image.fromarray(each)} for each in pictures]
    return _edited([prompt] * len(files), files, seed, _FORGOTTEN | fields)


def sketched(prompts: Sequence[str], edges: Sequence[Pixels], seed: int, scale: float) -> list[Pixels]:
    """By the ControlNet, along edge maps; the start is blank and forgotten."""
    net = {"path": "net", "control_image_url": "edges", "conditioning_scale": scale}
    file = folder("flux-world-canny") / "diffusion_pytorch_model.safetensors"
    files = [_blank() | {"net": file, "edges": Image.fromarray(each)} for each in edges]
    return _edited(prompts, files, seed, _FORGOTTEN | {"controlnets": [net]})


def _edited(prompts: Sequence[str], files: Sequence[Any], seed: int, fields: Any) -> list[Pixels]:
    known = {"image_url": START, "num_inference_steps": STEPS}
    wishes = [
        inversion.Input.model_validate(known | fields | {"prompt": prompt, "seed": seed + number})
        for number, prompt in enumerate(prompts)
    ]
    return draw(flux_general_rf_inversion.Pipeline(model()), wishes, *files)


def _blank() -> dict[str, Any]:
    return {START: Image.new("RGB", (SIDE_PX, SIDE_PX), "gray")}


def recoloured(asked: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The same, each in another colour."""
    names = tuple(COLOURS)
    return [each | {"colour": names[(names.index(each["colour"]) + 2) % len(names)]} for each in asked]
