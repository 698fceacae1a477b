"""`fal-ai/flux/dev` on FLUX: text to image."""

from pipelines.base import Assets, Generation
from pipelines.engine.sample import Sample
from pipelines.flux.pipeline import FluxPipeline
from pipelines.flux.plan import FluxPlan
from pipelines.flux.sampling import Grid, draw_noise
from schemas.endpoints.flux_dev import Input, Output
from schemas.fields import Image, resolve


class Pipeline(FluxPipeline[Input]):
    """Noise from the seed, denoised under the prompt."""

    def prepare(self, request: Input, assets: Assets, seed: int) -> Generation:
        seed = seed if request.seed is None else request.seed
        size = resolve(request.image_size)
        grid = Grid.of(size.width, size.height)
        plan = FluxPlan(
            grid,
            self.model.encode_prompt(request.prompt),
            self.model.sigmas(request.num_inference_steps, grid),
            request.guidance_scale,
        )
        noise = (draw_noise(grid, seed + image) for image in range(request.num_images))
        return Generation(
            samples=tuple(
                Sample(f"image {number}", plan, self.model.to_device(latents))
                for number, latents in enumerate(noise)
            ),
            seed=seed,
            format="jpeg",
            check_safety=request.enable_safety_checker,
            inline=request.sync_mode,
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
            images=images,
            timings=timings,
            seed=seed,
            has_nsfw_concepts=flags,
            prompt=request.prompt,
        )
