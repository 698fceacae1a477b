"""`fal-ai/flux/dev` on FLUX: text to image."""

from pipelines.base import Assets, Generation
from pipelines.engine.sample import Sample
from pipelines.flux.pipeline import FluxPipeline
from pipelines.flux.plan import Denoising, FluxPlan
from pipelines.flux.sampling import Grid, draw_noise
from schemas.endpoints.flux_dev import Input, Output
from schemas.fields import resolve


class Pipeline(FluxPipeline[Input]):
    """Noise from the seed, denoised under the prompt."""

    output_type = Output

    def prepare(self, request: Input, assets: Assets, seed: int) -> Generation:
        seed = seed if request.seed is None else request.seed
        size = resolve(request.image_size)
        grid = Grid.of(size.width, size.height)
        denoising = Denoising(
            self.model.encode_prompt(request.prompt),
            self.model.sigmas(request.num_inference_steps, grid),
            request.guidance_scale,
            reuse=self.model.reuse,
        )
        noise = (draw_noise(grid, seed + image) for image in range(request.num_images))
        return Generation(
            samples=tuple(
                Sample(f"image {number}", FluxPlan(grid, denoising), self.model.to_device(latents))
                for number, latents in enumerate(noise)
            ),
            seed=seed,
            format="jpeg",
            check_safety=request.enable_safety_checker,
            inline=request.sync_mode,
        )
