"""FLUX.1 Redux at the embedded FLUX's size, with random weights: 16 tokens for a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

_SEED = 1
_IMAGE_PX = 32
_VISION_WIDTH = 32
_TEXT_WIDTH = 32  # the embedded FLUX's


def build(folder: Path, report: Callable[[str], None]) -> None:
    """Fill an empty folder with what `FluxPriorReduxPipeline.from_pretrained` loads.

    As published, it has no text encoders. The same bytes each time; torch's global random state
    is left as it was.
    """
    report("building the image encoder")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        pipeline = FluxPriorReduxPipeline(
            image_encoder=_encoder(), feature_extractor=_processor(), image_embedder=_embedder()
        )
    report("saving")
    pipeline.save_pretrained(folder, safe_serialization=True)


def _encoder() -> Any:
    config = SiglipVisionConfig(
        image_size=_IMAGE_PX,
        patch_size=8,
        hidden_size=_VISION_WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
    )
    return SiglipVisionModel(config)


def _processor() -> Any:
    return SiglipImageProcessorPil(size={"height": _IMAGE_PX, "width": _IMAGE_PX})


def _embedder() -> Any:
    embedder = ReduxImageEncoder(redux_dim=_VISION_WIDTH, txt_in_features=_TEXT_WIDTH)
    _speak_up(embedder)
    return embedder


def _speak_up(embedder: Any) -> None:
    """Make the tokens as loud as T5's, whose mean square is 1: as drawn, theirs is 0.04."""
    with torch.no_grad():
        embedder.redux_down.weight.mul_(5)
        embedder.redux_down.bias.mul_(5)
