"""What the Stable Diffusion endpoints share: LoRAs, and everything after the last step."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

import torch
from PIL.Image import Image as Picture

from pipelines import images
from pipelines.adapters.bank import LoraUse
from pipelines.base import Assets, InputT, Pipeline, named_by
from pipelines.engine.sample import Sample
from pipelines.sd.base import Base, plan_of
from pipelines.sd.model import SdModel
from schemas.errors import InternalError


class LoraWish(Protocol):
    """A LoRA as an endpoint's Input has it."""

    @property
    def scale(self) -> float: ...


class SdPipeline(Pipeline[InputT, SdModel]):
    """An endpoint on Stable Diffusion; subclasses say how a request is prepared and answered."""

    model_type = SdModel

    def finish(self, sample: Sample) -> Picture:
        if not torch.isfinite(sample.latents).all():
            raise InternalError("The model's numbers overflowed; try another seed, size or guidance scale.")
        return images.from_tensor(plan_of(sample).base.decode(sample.latents))

    def preview(self, sample: Sample) -> Picture:
        assert sample.denoised is not None, "a preview needs at least one step"
        return images.from_tensor(plan_of(sample).base.decode_small(sample.denoised))

    def _hold_loras(
        self, base: Base, wishes: Sequence[LoraWish], assets: Assets, held: ExitStack
    ) -> tuple[LoraUse, ...]:
        """The request's LoRAs, resident until `held` is closed. One at scale 0 is checked and left out."""
        found, uses = {}, []
        for index, wish in enumerate(wishes):
            loc = ("body", "loras", index, "path")
            path = assets.weights[loc]
            with named_by(loc):
                lora = self.model.read_lora(base, path)
            if wish.scale:
                found[path.name] = lora
                uses.append(LoraUse(path.name, wish.scale))
        with named_by(("body", "loras")):
            held.enter_context(base.holding(found))
        return tuple(uses)
