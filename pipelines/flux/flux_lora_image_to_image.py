"""`fal-ai/flux-lora/image-to-image` on FLUX: a start picture, partly noised, denoised with LoRAs."""

from contextlib import ExitStack

from PIL.Image import Image as Picture

from pipelines.adapters.bank import LoraUse
from pipelines.base import Assets, Generation
from pipelines.engine.sample import Sample
from pipelines.flux.pipeline import FluxPipeline
from pipelines.flux.plan import FluxPlan
from pipelines.flux.sampling import Grid, draw_noise, noised, remaining
from schemas.endpoints.flux_lora_image_to_image import Input, Output
from schemas.errors import AssetError
from schemas.fields import Image, resolve


class Pipeline(FluxPipeline[Input]):
    """The last `strength` of the schedule, from the start picture noised to where it begins."""

    def prepare(self, request: Input, assets: Assets, seed: int) -> Generation:
        seed = seed if request.seed is None else request.seed
        start = assets.images[request.image_url]
        grid = self._grid(request, start)
        with ExitStack() as held:
            loras = self._hold_loras(request, assets, held)
            plan = FluxPlan(
                grid,
                self.model.encode_prompt(request.prompt, loras),
                remaining(self.model.sigmas(request.num_inference_steps, grid), request.strength),
                request.guidance_scale,
                loras,
            )
            latents = self.model.encode_image(start, grid).cpu()
            samples = tuple(
                Sample(
                    f"image {number}",
                    plan,
                    self.model.to_device(noised(latents, draw_noise(grid, seed + number), plan.sigmas[0])),
                )
                for number in range(request.num_images)
            )
            return Generation(
                samples,
                seed,
                request.output_format,
                check_safety=request.enable_safety_checker,
                inline=request.sync_mode,
                resources=held.pop_all(),
            )

    def answer(
        self,
        request: Input,
        images: list[Image],
        seed: int,
        flags: list[bool],
        timings: dict[str, float],
    ) -> Output:
        return Output(
            images=images, timings=timings, seed=seed, has_nsfw_concepts=flags, prompt=request.prompt
        )

    def _grid(self, request: Input, start: Picture) -> Grid:
        """The size asked for, or the start picture's, scaled down to what this server makes."""
        if request.image_size is not None:
            size = resolve(request.image_size)
            return Grid.of(size.width, size.height)
        return Grid.within(start.width, start.height, self.model.max_pixels)

    def _hold_loras(self, request: Input, assets: Assets, held: ExitStack) -> tuple[LoraUse, ...]:
        """The request's LoRAs, resident until `held` is closed. One at scale 0 is checked and left out."""
        files, uses = {}, []
        for index, wish in enumerate(request.loras):
            path = assets.weights[wish.path]
            try:
                lora = self.model.read_lora(path)
            except AssetError as error:
                raise error.at(("body", "loras", index, "path")) from None
            if wish.scale:
                files[path.name] = lora
                uses.append(LoraUse(path.name, wish.scale))
        try:
            held.enter_context(self.model.holding(files))
        except AssetError as error:
            raise error.at(("body", "loras")) from None
        return tuple(uses)
