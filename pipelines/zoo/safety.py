"""Stable Diffusion's safety checker, tiny and with random weights: it runs and flags nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

_SEED = 1
_IMAGE_PX = 32
# A concept is found where a cosine exceeds its threshold; no cosine reaches this one.
_NEVER = 2.0


def build(folder: Path, report: Callable[[str], None]) -> None:
    """Fill an empty folder with `safety_checker/` and `feature_extractor/`, both loadable.

    The same bytes each time; torch's global random state is left as it was.
    """
    report("building the safety checker")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        checker = _checker()
    report("saving")
    checker.save_pretrained(folder / "safety_checker")
    _processor().save_pretrained(folder / "feature_extractor")


def _checker() -> Any:
    vision = {
        "image_size": _IMAGE_PX,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=32))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(_NEVER)
        checker.special_care_embeds_weights.fill_(_NEVER)
    return checker


def _processor() -> Any:
    size = {"height": _IMAGE_PX, "width": _IMAGE_PX}
    return CLIPImageProcessor(size={"shortest_edge": _IMAGE_PX}, crop_size=size)
