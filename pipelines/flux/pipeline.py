"""What the FLUX endpoints share: sizes, LoRAs, and everything after the last step."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from PIL.Image import Image as Picture

from pipelines import images
from pipelines.adapters.bank import LoraUse
from pipelines.adapters.lora import Lora
from pipelines.adapters.tensor_file import invalid
from pipelines.base import Assets, InputT, Outcome, Pipeline, named_by
from pipelines.engine.sample import Sample
from pipelines.flux.lora_keys import layer_scales
from pipelines.flux.model import FluxModel, plan_of
from pipelines.flux.plan import Adapters
from pipelines.flux.sampling import Grid
from schemas.endpoints.flux_dev import Output
from schemas.errors import Location, NotFinite
from schemas.fields import EndpointInput, ImageSize, ImageSizePreset, resolve


class LoraWish(Protocol):
    """A LoRA as an endpoint's Input has it."""

    @property
    def scale(self) -> float | Mapping[str, float]: ...


@dataclass(frozen=True, slots=True)
class FoundLora:
    """A LoRA of a request: the field that names it, its content, and how it is used."""

    loc: Location  # of the object with path and scale
    lora: Lora
    use: LoraUse


class FluxPipeline(Pipeline[InputT, FluxModel]):
    """An endpoint on FLUX; subclasses say how a request is prepared."""

    model_type = FluxModel
    output_type: ClassVar[type[Output]]

    def finish(self, sample: Sample) -> Picture:
        if not torch.isfinite(sample.latents).all():
            raise NotFinite
        return images.from_tensor(self.model.decode(sample.latents, plan_of(sample).grid))

    def preview(self, sample: Sample) -> Picture:
        assert sample.denoised is not None, "a preview needs at least one step"
        return images.from_tensor(self.model.decode_small(sample.denoised, plan_of(sample).grid))

    def answer(self, request: InputT, outcome: Outcome) -> Output:
        return self.output_type(
            images=outcome.images,
            timings=dict(outcome.timings),
            seed=outcome.seed,
            has_nsfw_concepts=list(outcome.flags),
            prompt=request.model_dump(include={"prompt"})["prompt"],
        )

    def _grid(self, request: EndpointInput, size: ImageSize | ImageSizePreset | None, start: Picture) -> Grid:
        """The size asked for, or the start picture's, scaled down to what this server makes.

        Raises InputError where that is too much work.
        """
        if size is not None:
            size = resolve(size)
            return Grid.of(size.width, size.height)
        grid = Grid.within(start.width, start.height, self.model.limits.max_pixels)
        request.check_work(ImageSize(width=grid.width, height=grid.height), self.model.limits)
        return grid

    def _read_loras(self, field: str, wishes: Sequence[LoraWish], assets: Assets) -> list[FoundLora]:
        """The LoRAs of a field, checked. Raises InputError with the path of what is wrong."""
        found = []
        for index, wish in enumerate(wishes):
            loc = ("body", field, index)
            path = assets.weights[*loc, "path"]
            with named_by((*loc, "path")):
                lora = self.model.read_lora(path)
            with named_by((*loc, "scale")):
                found.append(FoundLora(loc, lora, self._use(path.name, wish.scale)))
        return found

    def _read_styles(self, field: str, wishes: Sequence[LoraWish], assets: Assets) -> list[FoundLora]:
        """As `_read_loras`, of LoRAs that read no control image."""
        found = self._read_loras(field, wishes, assets)
        for each in found:
            if each.lora.control is not None:
                message = "The LoRA reads a control image; it belongs in control_loras, where there are such."
                raise invalid(message).at((*each.loc, "path"))
        return found

    def _use(self, name: str, scale: float | Mapping[str, float]) -> LoraUse:
        """Layers that a map does not name get 1."""
        if isinstance(scale, Mapping):
            return LoraUse(name, 1.0, layer_scales(scale, self.model.targets))
        return LoraUse(name, scale)

    def _adapters(self, found: Sequence[FoundLora], held: ExitStack) -> Adapters:
        """LoRAs, kept beside the model until `held` is closed. One at scale 0 is left out."""
        used = [each for each in found if each.use.scale]
        if used:
            with named_by(used[0].loc[:2]):
                held.enter_context(self.model.holding({each.use.name: each.lora for each in used}))
        norms = {name: weight for each in used for name, weight in each.lora.norms.items()}
        return Adapters(
            tuple(each.use for each in used),
            {name: self.model.as_weights(weight) for name, weight in norms.items()},
        )
