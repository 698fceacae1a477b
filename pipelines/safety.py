"""Pictures → flags, with the CompVis safety checker that Stable Diffusion ships with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL.Image import Image
from transformers import CLIPImageProcessor


class SafetyChecker:
    """Tells unsafe pictures by their CLIP embeddings' distance to fixed concepts."""

    def __init__(self, checker: Any, processor: Any) -> None:
        self._checker = checker
        self._processor = processor

    @classmethod
    def load(cls, source: Path | str, device: str) -> "SafetyChecker":
        """Load `safety_checker/` and `feature_extractor/` of a folder or a Hub id."""
        checker = StableDiffusionSafetyChecker.from_pretrained(source, subfolder="safety_checker")
        processor = CLIPImageProcessor.from_pretrained(source, subfolder="feature_extractor")
        return cls(checker.to(device).eval(), processor)

    @torch.inference_mode()
    def flags(self, pictures: Sequence[Image]) -> list[bool]:
        """Whether each picture is unsafe. The pictures are not changed."""
        pixels = self._processor(list(pictures), return_tensors="pt").pixel_values
        # The checker blackens the arrays it is given; these stand-ins are thrown away.
        stand_ins = [np.zeros((1, 1, 3), dtype=np.float32) for _ in pictures]
        _, flags = self._checker(clip_input=pixels.to(self._checker.device), images=stand_ins)
        return [bool(flag) for flag in flags]
