"""A Depth-Anything model, tiny and with random weights: its depth follows the picture, but is no depth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessorPil,
)

_SEED = 1
_IMAGE_PX = 112
_PATCH_PX = 14


def build(folder: Path, report: Callable[[str], None]) -> None:
    """Fill an empty folder with a model and its image processor, both loadable.

    The same bytes each time; torch's global random state is left as it was.
    """
    report("building the depth model")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        model = _model()
    report("saving")
    model.save_pretrained(folder)
    _processor().save_pretrained(folder)


def _model() -> Any:
    backbone = Dinov2Config(
        image_size=2 * _PATCH_PX,
        patch_size=_PATCH_PX,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=4,
        mlp_ratio=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=_PATCH_PX,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    return DepthAnythingForDepthEstimation(config)


def _processor() -> Any:
    # Depth-Anything's own values but for the size, 518 × 518 there.
    return DPTImageProcessorPil(
        size={"height": _IMAGE_PX, "width": _IMAGE_PX},
        keep_aspect_ratio=True,
        ensure_multiple_of=_PATCH_PX,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
