"""`fal-ai/lora/image-to-image` on any Stable Diffusion checkpoint: pictures made or remade, with adapters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from PIL.Image import Image as Picture
from pydantic import BaseModel
from torch import Tensor

from pipelines import images
from pipelines.base import Assets, Generation, Glimpse, Outcome, named_by
from pipelines.engine.sample import Sample
from pipelines.sd.base import Base, plan_of
from pipelines.sd.embeddings import TokenEmbedding
from pipelines.sd.grid import PIXELS_PER_CELL, Grid, draw_noise
from pipelines.sd.guides import GuideReader
from pipelines.sd.kit import Kit, gather
from pipelines.sd.pipeline import SdPipeline
from pipelines.sd.plan import Prompting, SdPlan
from pipelines.sd.schedule import Schedule, most_steps
from pipelines.sd.schedulers import ScheduleError
from pipelines.sd.text import Encoding
from pipelines.sd.tiles import Tile, tiles
from pipelines.sd.trace import Trace
from schemas.endpoints.lora_image_to_image import Input, Output
from schemas.errors import FieldError, InputError, Location
from schemas.fields import ImageSize
from schemas.settings import Limits

SIDE = 1024  # of a picture without a start picture
MAX_TRACE_BYTES = 2**30  # of pictures that a request gets for debugging, before they are compressed


class Pipeline(SdPipeline[Input]):
    """The end of a schedule from the start picture noised, or all of it from noise."""

    def hold(self, request: Input, assets: Assets) -> ExitStack:
        self._grid(request, assets)
        with ExitStack() as held:
            gather(self.model, request, assets, held)
            return held.pop_all()

    def prepare(self, request: Input, assets: Assets, seed: int) -> Generation:
        seed = seed if request.seed is None else request.seed
        with ExitStack() as held:
            kit = gather(self.model, request, assets, held)
            samples = self._samples(request, assets, kit, seed)
            return Generation(
                samples,
                seed,
                request.image_format,
                check_safety=request.enable_safety_checker,
                inline=False,
                resources=held.pop_all(),
            )

    def traces(self, generation: Generation) -> Mapping[str, Iterable[Glimpse]]:
        plans = [plan_of(sample) for sample in generation.samples]
        trace = plans[0].trace
        traces = {
            "debug_latents": _steps(plans) if trace.keeps_steps else None,
            "debug_per_pass_latents": _tiles(plans) if trace.keeps_tiles else None,
        }
        return {field: each for field, each in traces.items() if each}

    def answer(self, request: Input, outcome: Outcome) -> BaseModel:
        return Output(
            images=list(outcome.pictures),
            seed=outcome.seed,
            has_nsfw_concepts=list(outcome.flags),
            debug_latents=outcome.traces.get("debug_latents"),
            debug_per_pass_latents=outcome.traces.get("debug_per_pass_latents"),
        )

    def _samples(self, request: Input, assets: Assets, kit: Kit, seed: int) -> tuple[Sample, ...]:
        base, grid = kit.base, self._grid(request, assets)
        _check_steps(request, base)
        views = tiles(
            grid,
            request.tile_width,
            request.tile_height,
            request.tile_stride_width,
            request.tile_stride_height,
        )
        _check_tiles(request, views, self.model.limits)
        _check_trace(request, grid, views)
        picture = assets.images.get(("body", "image_url"))
        seeds = [seed + number for number in range(request.num_images)]
        schedules = [_schedule(request, base, each, from_picture=picture is not None) for each in seeds]
        guides = GuideReader(self.model, kit, request, assets, grid)
        beside = guides.beside()
        texts = self._texts(request, assets, kit)
        start = base.encode_image(picture, grid) if picture else None

        def sample(number: int) -> Sample:
            schedule, sides = schedules[number], guides.sides(*texts, seeds[number])
            plan = SdPlan(
                base,
                grid,
                Prompting(*sides, request.guidance_scale),
                schedule,
                kit.loras,
                beside=beside,
                tiles=views,
                trace=Trace(steps=request.debug_latents, tiles=request.debug_per_pass_latents),
            )
            noise = base.to_device(draw_noise(grid, seeds[number]))
            return Sample(f"image {number}", plan, _started(schedule, start, noise))

        return tuple(sample(number) for number in range(request.num_images))

    def _grid(self, request: Input, assets: Assets) -> Grid:
        """The start picture's size, scaled down to what this server makes. Raises InputError."""
        start = assets.images.get(("body", "image_url"))
        width, height = start.size if start else (SIDE, SIDE)
        grid = Grid.within(width, height, self.model.limits.max_pixels)
        request.check_work(ImageSize(width=grid.width, height=grid.height), self.model.limits)
        return grid

    def _texts(self, request: Input, assets: Assets, kit: Kit) -> tuple[Encoding, Encoding]:
        """The prompt and the negative one."""
        words: list[TokenEmbedding] = []
        for index, wish in enumerate(request.embeddings):
            loc: Location = ("body", "embeddings", index, "path")
            with named_by(loc):
                words += kit.base.read_embedding(assets.weights[loc], wish.tokens)
        with named_by(("body", "clip_skip")):
            prompt, negative = kit.base.encode_texts(
                (request.prompt, request.negative_prompt),
                kit.loras,
                weighted=request.prompt_weighting,
                clip_skip=request.clip_skip,
                embeddings=words,
            )
        return prompt, negative


def _schedule(request: Input, base: Base, seed: int, *, from_picture: bool) -> Schedule | None:
    """The steps of one picture; none where a start picture gets no noise."""
    if from_picture and not request.noise_strength:
        return None
    try:
        return Schedule.build(
            request.scheduler,
            base.scheduler_config,
            request.num_inference_steps,
            timesteps=request.timesteps.given,
            sigmas=request.sigmas.given,
            strength=request.noise_strength if from_picture else None,
            keep_steps=True,
            eta=request.eta,
            seed=seed,
        )
    except ScheduleError as error:
        raise _refusal(request, error) from error


def _started(schedule: Schedule | None, start: Tensor | None, noise: Tensor) -> Tensor:
    """The latents before the first step."""
    if start is None:
        assert schedule is not None, "without a start picture there are steps"
        return schedule.start_from_noise(noise)
    return start if schedule is None else schedule.start_from(start, noise)


def _check_steps(request: Input, base: Base) -> None:
    """Raise InputError for more steps than the scheduler has: LCM and TCD were distilled for few."""
    if request.timesteps.given or request.sigmas.given:
        return
    try:
        most = most_steps(request.scheduler, base.scheduler_config)
    except ScheduleError as error:
        raise _refusal(request, error) from error
    if request.num_inference_steps > most:
        message = f"This scheduler has at most {most} steps, got {request.num_inference_steps}."
        loc: Location = ("body", "num_inference_steps")
        raise InputError([FieldError(loc, message, "less_than_equal", {"le": most})])


def _refusal(request: Input, error: ScheduleError) -> InputError:
    """The error with the field that the schedule cannot be because of."""
    fields = {
        "timesteps": request.timesteps.given,
        "sigmas": request.sigmas.given,
        "scheduler": request.scheduler,
        "model_name": True,
    }
    field = next(name for name, given in fields.items() if given)
    return InputError([FieldError(("body", field), str(error), "value_error")])


def _check_tiles(request: Input, views: Sequence[Tile], limits: Limits) -> None:
    """Raise InputError for tiles that overlap so much that they are too much work for one request."""
    cells = sum(view.rows * view.columns for view in views)
    work = cells * PIXELS_PER_CELL**2 / 1e6 * request.num_images * request.steps
    most = limits.max_megapixel_steps
    if work > most:
        message = (
            f"{len(views)} tiles in {request.steps} steps of {request.num_images} images are {work:.0f} "
            f"megapixel-steps, at most {most:g} are taken; ask for longer strides"
        )
        raise InputError(
            [FieldError(("body", "tile_stride_width"), message, "less_than_equal", {"le": most})]
        )


def _check_trace(request: Input, grid: Grid, views: Sequence[Tile]) -> None:
    """Raise InputError for more pictures for debugging than there is memory for."""
    cells = {
        "debug_latents": grid.rows * grid.columns,
        "debug_per_pass_latents": sum(view.rows * view.columns for view in views),
    }
    steps = max(request.num_inference_steps, len(request.timesteps.given), len(request.sigmas.given))
    for field, each in cells.items():
        nbytes = each * PIXELS_PER_CELL**2 * 3 * steps * request.num_images
        if getattr(request, field) and nbytes > MAX_TRACE_BYTES:
            message = (
                f"These pictures would take {nbytes} bytes, at most {MAX_TRACE_BYTES} are made; "
                "ask for fewer steps, images or tiles."
            )
            raise InputError([FieldError(("body", field), message, "too_long")])


def _steps(plans: Sequence[SdPlan]) -> Iterator[Glimpse]:
    """The latents after each step, decoded one by one: IMAGE_STEP."""
    for image, plan in enumerate(plans):
        for step, latents in plan.trace.steps.items():
            yield Glimpse(image, f"{image:04}_{step:04}", _decoded(plan, latents))


def _tiles(plans: Sequence[SdPlan]) -> Iterator[Glimpse]:
    """The latents in each tile after each step, decoded one by one: IMAGE_STEP_TILE."""
    for image, plan in enumerate(plans):
        for step, parts in plan.trace.tiles.items():
            for tile, latents in enumerate(parts):
                yield Glimpse(image, f"{image:04}_{step:04}_{tile:04}", _decoded(plan, latents))


def _decoded(plan: SdPlan, latents: Tensor) -> Picture:
    return images.from_tensor(plan.base.decode(plan.base.to_device(latents)))
