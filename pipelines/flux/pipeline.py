"""What every FLUX endpoint does after its last step."""

import torch
from PIL.Image import Image as Picture

from pipelines import images
from pipelines.base import InputT, Pipeline
from pipelines.engine.sample import Sample
from pipelines.flux.model import FluxModel, plan_of
from schemas.errors import InternalError


class FluxPipeline(Pipeline[InputT, FluxModel]):
    """An endpoint on FLUX; subclasses say how a request is prepared and answered."""

    model_type = FluxModel

    def finish(self, sample: Sample) -> Picture:
        if not torch.isfinite(sample.latents).all():
            raise InternalError("The model's numbers overflowed; try another seed or size.")
        return images.from_tensor(self.model.decode(sample.latents, plan_of(sample).grid))

    def preview(self, sample: Sample) -> Picture:
        assert sample.denoised is not None, "a preview needs at least one step"
        return images.from_tensor(self.model.decode_small(sample.denoised, plan_of(sample).grid))
