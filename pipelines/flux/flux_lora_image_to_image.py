"""`fal-ai/flux-lora/image-to-image` on FLUX: a start picture, partly noised, denoised with LoRAs."""

from contextlib import ExitStack

from pipelines.base import Assets, Generation
from pipelines.engine.sample import Sample
from pipelines.flux.pipeline import FluxPipeline
from pipelines.flux.plan import Denoising, FluxPlan
from pipelines.flux.sampling import draw_noise, noised, remaining
from schemas.endpoints.flux_lora_image_to_image import Input, Output


class Pipeline(FluxPipeline[Input]):
    """The last `strength` of the schedule, from the start picture noised to where it begins."""

    output_type = Output

    def hold(self, request: Input, assets: Assets) -> ExitStack:
        self._grid(request, request.image_size, assets.images["body", "image_url"])
        with ExitStack() as held:
            self._adapters(self._read_styles("loras", request.loras, assets), held)
            return held.pop_all()

    def prepare(self, request: Input, assets: Assets, seed: int) -> Generation:
        seed = seed if request.seed is None else request.seed
        start = assets.images["body", "image_url"]
        grid = self._grid(request, request.image_size, start)
        with ExitStack() as held:
            adapters = self._adapters(self._read_styles("loras", request.loras, assets), held)
            sigmas = remaining(self.model.sigmas(request.num_inference_steps, grid), request.strength)
            text = self.model.encode_prompt(request.prompt, adapters.loras)
            leg = Denoising(text, sigmas, request.guidance_scale, adapters, reuse=self.model.reuse)
            plan = FluxPlan(grid, leg)
            picture = self.model.encode_image(start, grid).cpu()
            samples = tuple(
                Sample(
                    f"image {number}",
                    plan,
                    self.model.to_device(noised(picture, draw_noise(grid, seed + number), sigmas[0])),
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
