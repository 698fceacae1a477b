"""FLUX.1 Redux: pictures in the place of words, as tokens that follow the prompt's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL.Image import Image as Picture
from torch import Tensor
from transformers import SiglipImageProcessorPil, SiglipVisionModel


class Redux:
    """SigLIP's view of a picture, projected to where T5's tokens live.

    Knows nothing of the prompt: whoever conditions a sample appends these tokens to T5's.
    """

    def __init__(self, encoder: Any, processor: Any, embedder: Any) -> None:
        self._encoder = encoder
        self._processor = processor
        self._embedder = embedder

    @classmethod
    def load(cls, source: Path | str, device: str, dtype: torch.dtype, text_width: int) -> Self:
        """Load `image_encoder/`, `feature_extractor/` and `image_embedder/` of a folder or a Hub id.

        Raises ValueError when its tokens are not as wide as the base model's text tokens.
        """
        embedder = ReduxImageEncoder.from_pretrained(source, subfolder="image_embedder", dtype=dtype)
        _check_width(source, embedder.config.txt_in_features, text_width)
        encoder = SiglipVisionModel.from_pretrained(source, subfolder="image_encoder", dtype=dtype)
        processor = SiglipImageProcessorPil.from_pretrained(source, subfolder="feature_extractor")
        return cls(encoder.to(device).eval(), processor, embedder.to(device).eval())

    @torch.inference_mode()
    def tokens(self, pictures: Sequence[Picture]) -> Tensor:
        """One or more RGB pictures of any size → [patches, text width] in the model's dtype: their mean.

        FLUX.1-Redux-dev makes 729 tokens, 4096 wide, of 384 × 384 pixels. The mean is diffusers'
        FluxPriorReduxPipeline with `prompt_embeds_scale` 1 / n, so equal pictures count as one.
        """
        assert pictures, "Redux has no picture to look at"
        return torch.stack([self._look_at(picture) for picture in pictures]).mean(0)

    def _look_at(self, picture: Picture) -> Tensor:
        """[patches, text width]. One picture at a time: how many come with it changes no bit of it."""
        pixels = self._processor(picture, return_tensors="pt").pixel_values
        seen = self._encoder(pixels.to(self._encoder.device, self._encoder.dtype)).last_hidden_state
        tokens: Tensor = self._embedder(seen).image_embeds[0]
        return tokens


def _check_width(source: Path | str, width: int, text_width: int) -> None:
    if width != text_width:
        raise ValueError(
            f"the Redux at {source} makes tokens {width} wide, the base model's are {text_width} wide"
        )
