"""`fal-ai/fast-sdxl-controlnet-canny/image-to-image` on SDXL: a start picture remade along a control image's
edges."""

from contextlib import ExitStack

from PIL.Image import Image as Picture
from pydantic import BaseModel

from pipelines import images
from pipelines.base import Assets, Generation, Outcome
from pipelines.engine.sample import Sample
from pipelines.preprocess import canny
from pipelines.sd.controlnet import ControlUse
from pipelines.sd.grid import Grid, draw_noise
from pipelines.sd.loras import hold_loras
from pipelines.sd.model import SdModel
from pipelines.sd.pipeline import SdPipeline
from pipelines.sd.plan import Prompting, SdPlan, Side
from pipelines.sd.schedule import Schedule
from pipelines.timed import Timed
from schemas.endpoints.fast_sdxl_controlnet_canny_image_to_image import Input, Output
from schemas.fields import ImageSize, resolve

# What the usual canny ControlNets of SDXL were trained on.
LOW, HIGH = 100, 200


class Pipeline(SdPipeline[Input]):
    """The last `strength` of the schedule, from the start picture noised to where it begins."""

    def __init__(self, model: SdModel) -> None:
        super().__init__(model)
        if model.base.kind != "sdxl" or model.controlnet is None:
            raise ValueError("this endpoint needs an SDXL `model` and a `controlnet` in its settings")

    def hold(self, request: Input, assets: Assets) -> ExitStack:
        self._grid(request, assets.images["body", "control_image_url"])
        with ExitStack() as held:
            hold_loras(self.model, self.model.base, request.loras, assets, held)
            return held.pop_all()

    def prepare(self, request: Input, assets: Assets, seed: int) -> Generation:
        seed = seed if request.seed is None else request.seed
        base = self.model.base
        grid = self._grid(request, assets.images["body", "control_image_url"])
        with ExitStack() as held:
            loras = hold_loras(self.model, base, request.loras, assets, held)
            prompt = self._prompt(request, seed)
            prompted, negative = base.encode_texts((prompt, request.negative_prompt), loras)
            picture = base.encode_image(assets.images["body", "image_url"], grid)
            control = self._control(request, assets, grid)
            prompting = Prompting(Side(prompted, control), Side(negative, control), request.guidance_scale)

            def sample(number: int) -> Sample:
                schedule = Schedule.build(
                    None,
                    base.scheduler_config,
                    request.num_inference_steps,
                    strength=request.strength,
                    seed=seed + number,
                )
                plan = SdPlan(base, grid, prompting, schedule, loras)
                noise = base.to_device(draw_noise(grid, seed + number))
                return Sample(f"image {number}", plan, schedule.start_from(picture, noise))

            return Generation(
                tuple(sample(number) for number in range(request.num_images)),
                seed,
                "jpeg",
                check_safety=request.enable_safety_checker,
                inline=request.sync_mode,
                notes=self._notes(request),
                resources=held.pop_all(),
            )

    def answer(self, request: Input, outcome: Outcome) -> BaseModel:
        return Output(
            images=outcome.images,
            timings=dict(outcome.timings),
            seed=outcome.seed,
            has_nsfw_concepts=list(outcome.flags),
        )

    def _grid(self, request: Input, control: Picture) -> Grid:
        """The size asked for, or the control image's, scaled down to what this server makes."""
        if request.image_size is not None:
            size = resolve(request.image_size)
            return Grid.of(size.width, size.height)
        grid = Grid.within(control.width, control.height, self.model.limits.max_pixels)
        request.check_work(ImageSize(width=grid.width, height=grid.height), self.model.limits)
        return grid

    def _prompt(self, request: Input, seed: int) -> str:
        """The prompt, written on where that is asked for and there is a model for it."""
        if request.expand_prompt and self.model.expander:
            return self.model.expander.expand(request.prompt, seed)
        return request.prompt

    def _notes(self, request: Input) -> tuple[str, ...]:
        if request.expand_prompt and not self.model.expander:
            return ("no language model is configured: the prompt was not expanded",)
        return ()

    def _control(self, request: Input, assets: Assets, grid: Grid) -> tuple[Timed[ControlUse], ...]:
        """The control image's edges under the resident ControlNet, if they count."""
        if not request.controlnet_conditioning_scale:
            return ()
        picture = images.fill(assets.images["body", "control_image_url"], grid.width, grid.height)
        if self.model.finds_edges:
            picture = canny(picture, LOW, HIGH)
        pixels = self.model.base.as_weights((images.to_tensor(picture) + 1) / 2)
        use = ControlUse(self.model.controlnet, pixels, request.controlnet_conditioning_scale)
        return (Timed(use),)
