"""`fal-ai/flux-general/rf-inversion` on FLUX: a picture inverted to structured noise, and denoised anew.

The first leg follows the model's unconditional field from the picture to noise, the second the prompt's
field back, drawn to the picture (RF-Inversion, arXiv 2410.10792, algorithms 1 and 2). LoRAs and control
LoRAs act on both legs, though the first sees no control image; everything else acts on the second.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor

from pipelines.adapters.tensor_file import invalid
from pipelines.base import Assets, Generation, named_by
from pipelines.engine.sample import Sample
from pipelines.flux.guides import GuideReader
from pipelines.flux.pipeline import FluxPipeline, FoundLora
from pipelines.flux.plan import Adapters, Conditioning, Denoising, FluxPlan, Guides, Inversion, Pull
from pipelines.flux.sampling import Grid, draw_noise, etas
from schemas.endpoints.flux_general_rf_inversion import Input, Output
from schemas.errors import Location

SOURCE_GUIDANCE = 0.0  # of the unconditional field, as in the paper


@dataclass(frozen=True, slots=True, eq=False)
class _Edit:
    """What the images of one request share."""

    picture: Tensor
    nothing: Conditioning  # that of no prompt
    gamma: float
    denoising: Denoising


class Pipeline(FluxPipeline[Input]):
    """Inversion, then denoising under everything that the request gives to look at."""

    output_type = Output

    def hold(self, request: Input, assets: Assets) -> ExitStack:
        grid = self._grid(request, request.image_size, assets.images["body", "image_url"])
        with ExitStack() as held:
            reader = GuideReader(self.model, assets, grid, held)
            styles, controls = self._loras(request, assets)
            self._adapters([*styles, *controls], held)
            reader.hold_nets(request.controlnets, request.controlnet_unions)
            return held.pop_all()

    def prepare(self, request: Input, assets: Assets, seed: int) -> Generation:
        seed = seed if request.seed is None else request.seed
        grid = self._grid(request, request.image_size, assets.images["body", "image_url"])
        with ExitStack() as held:
            edit = self._edit(request, assets, grid, held)
            return Generation(
                tuple(
                    self._sample(f"image {number}", grid, edit, seed + number)
                    for number in range(request.num_images)
                ),
                seed,
                request.output_format,
                check_safety=request.enable_safety_checker,
                inline=request.sync_mode,
                resources=held.pop_all(),
            )

    def _edit(self, request: Input, assets: Assets, grid: Grid, held: ExitStack) -> _Edit:
        reader = GuideReader(self.model, assets, grid, held)
        styles, controls = self._loras(request, assets)
        adapters = self._adapters([*styles, *controls], held)
        guides = Guides(
            reader.embedding(controls, request.control_loras),
            reader.controls(request.controlnets, request.controlnet_unions),
            reader.conditions(request.easycontrols),
            reader.reference(request.reference_strength, request.reference_start, request.reference_end),
        )
        picture = self.model.encode_image(assets.images["body", "image_url"], grid)
        denoising = Denoising(
            self._text(request, assets, adapters),
            self._sigmas(request, grid),
            request.guidance_scale,
            adapters,
            guides,
            Pull(picture, _etas(request)),
            request.scheduler,
            request.use_cfg_zero,
        )
        nothing = self.model.encode_prompt("", adapters.loras)
        return _Edit(picture, nothing, request.controller_guidance_forward, denoising)

    def _loras(self, request: Input, assets: Assets) -> tuple[list[FoundLora], list[FoundLora]]:
        """The LoRAs without and with a control image."""
        styles = self._read_styles("loras", request.loras, assets)
        controls = self._read_loras("control_loras", request.control_loras, assets)
        for found in controls:
            if found.lora.control is None:
                message = "The LoRA reads no control image; such LoRAs belong in loras."
                raise invalid(message).at((*found.loc, "path"))
        return styles, controls

    def _text(self, request: Input, assets: Assets, adapters: Adapters) -> Conditioning:
        """The prompt, and the pictures beside it."""
        urls = request.fill_image.fill_image_url if request.fill_image else []
        field: Location = ("body", "fill_image", "fill_image_url")
        locs = [field] if isinstance(urls, str) else [(*field, index) for index in range(len(urls))]
        with named_by(field):
            return self.model.encode_prompt(
                request.prompt, adapters.loras, [assets.images[loc] for loc in locs]
            )

    def _sigmas(self, request: Input, grid: Grid) -> tuple[float, ...]:
        spacing = "beta" if request.use_beta_schedule else request.sigma_schedule or "even"
        steps = request.num_inference_steps
        return self.model.shifted_sigmas(steps, grid, request.base_shift, request.max_shift, spacing)

    def _sample(self, name: str, grid: Grid, edit: _Edit, seed: int) -> Sample:
        """Begins at the structured noise where it is known, else at the picture."""
        noise_name = _noise_name(grid, edit, seed)
        known = self.model.noises.find(noise_name)
        if known is not None:
            return Sample(name, FluxPlan(grid, edit.denoising), self.model.to_device(known))
        inversion = Inversion(
            edit.nothing,
            edit.denoising.sigmas[::-1],
            SOURCE_GUIDANCE,
            edit.denoising.adapters,
            self.model.to_device(draw_noise(grid, seed)),
            edit.gamma,
            keep=lambda noise: self._keep(noise_name, noise),
        )
        return Sample(name, FluxPlan(grid, inversion, edit.denoising), edit.picture)

    def _keep(self, name: str, noise: Tensor) -> None:
        """Keep a structured noise, unless its numbers overflowed: the next request shall try anew."""
        noise = noise.cpu()
        if noise.isfinite().all():
            self.model.noises.keep(name, noise)


def _etas(request: Input) -> tuple[float, ...]:
    return etas(
        request.num_inference_steps,
        request.controller_guidance_reverse,
        request.reverse_guidance_start,
        request.reverse_guidance_end,
        request.reverse_guidance_schedule,
    )


def _noise_name(grid: Grid, edit: _Edit, seed: int) -> str:
    """Equal names mean the same structured noise, to the bit."""
    uses = [(use.name, use.scale, sorted(use.layers.items())) for use in edit.denoising.adapters.loras]
    numbers = repr((grid, edit.denoising.sigmas, edit.gamma, seed, uses))
    return sha256(edit.picture.cpu().numpy().tobytes() + numbers.encode()).hexdigest()
