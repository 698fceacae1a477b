"""What the Stable Diffusion endpoints share: LoRAs, and everything after the last step."""

import torch
from PIL.Image import Image as Picture

from pipelines import images
from pipelines.base import InputT, Pipeline
from pipelines.engine.sample import Sample
from pipelines.sd.base import plan_of
from pipelines.sd.model import SdModel
from schemas.errors import NotFinite


class SdPipeline(Pipeline[InputT, SdModel]):
    """An endpoint on Stable Diffusion; subclasses say how a request is prepared and answered."""

    model_type = SdModel

    def finish(self, sample: Sample) -> Picture:
        if not torch.isfinite(sample.latents).all():
            raise NotFinite
        return images.from_tensor(plan_of(sample).base.decode(sample.latents))

    def preview(self, sample: Sample) -> Picture:
        assert sample.denoised is not None, "a preview needs at least one step"
        return images.from_tensor(plan_of(sample).base.decode_small(sample.denoised))
