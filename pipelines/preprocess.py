"""Pictures → the pictures that steer a control model: edges, depth."""

from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import torch
from PIL import Image
from PIL.Image import Image as Picture
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import DepthAnythingForDepthEstimation, DPTImageProcessorPil

from pipelines.images import from_tensor

# For FLUX: min_t and max_t in github.com/black-forest-labs/flux, flux/modules/image_embedders.py,
# CannyImageEncoder
CANNY_LOW, CANNY_HIGH = 50, 200

# Of a picture's sides, as the depth model sees it. Beyond, its processor rounds the short side to
# nothing, or makes a long side of any length out of it.
_LONGEST = 8


def canny(picture: Picture, low: int = CANNY_LOW, high: int = CANNY_HIGH) -> Picture:
    """An RGB picture → its edges, white on black, RGB, of the same size.

    What changes by more than `high` is an edge, and so is what is joined to one and changes by `low`.
    """
    return Image.fromarray(cv2.Canny(np.asarray(picture), low, high)).convert("RGB")


class DepthEstimator:
    """Tells near from far in one picture, with a Depth-Anything model of the relative kind."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model
        self._processor = processor

    @classmethod
    def load(cls, source: Path | str, device: str, dtype: torch.dtype = torch.float32) -> Self:
        """Load a folder or a Hub id such as LiheYoung/depth-anything-large-hf.

        Raises ValueError for a model of the metric kind: to those near is little.
        """
        model = DepthAnythingForDepthEstimation.from_pretrained(source, dtype=dtype)
        kind = model.config.depth_estimation_type
        if kind != "relative":
            raise ValueError(f"the depth model at {source} is {kind}, it must be relative")
        processor = DPTImageProcessorPil.from_pretrained(source)
        return cls(model.to(device).eval(), processor)

    @torch.inference_mode()
    def depth(self, picture: Picture) -> Picture:
        """An RGB picture → its depth, RGB, of the same size: near is white, far black.

        The nearest point is 255 and the farthest 0, whatever lies between them; all is 0 where
        nothing is nearer than the rest. So does image_gen_aux's DepthPreprocessor, which diffusers
        names for FLUX.1-Depth. Black Forest Labs' own DepthImageEncoder fits the estimate as we do
        (bicubic, antialiased), but takes it for 0…255 without scaling it.
        """
        estimate = self._estimate(_less_long(picture))
        fitted = interpolate(
            estimate[None, None], (picture.height, picture.width), mode="bicubic", antialias=True
        )
        return _grey(fitted[0, 0])

    def _estimate(self, picture: Picture) -> Tensor:
        """[rows, columns] in the model's own scale, at the size it likes, float32: near is much."""
        pixels = self._processor(picture, return_tensors="pt").pixel_values
        estimate: Tensor = self._model(pixels.to(self._model.device, self._model.dtype)).predicted_depth
        return estimate[0].float()


def _less_long(picture: Picture) -> Picture:
    """The same picture, its longer side squeezed to at most `_LONGEST` times the shorter."""
    most = _LONGEST * min(picture.size)
    if max(picture.size) <= most:
        return picture
    return picture.resize((min(picture.width, most), min(picture.height, most)), Image.Resampling.BICUBIC)


def _grey(values: Tensor) -> Picture:
    """[height, width] → RGB: the least black, the most white; all black if they differ by rounding."""
    low, high = values.aminmax()
    flat = high - low <= 1e-5 * high.abs()
    scaled = torch.zeros_like(values) if flat else (values - low) / (high - low)
    return from_tensor((scaled * 2 - 1).expand(3, -1, -1))
