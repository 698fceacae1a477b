"""FLUX's resident weights: two text encoders, the transformer, the VAE."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines.base import Model
from pipelines.engine.sample import Sample
from pipelines.flux.plan import Conditioning, FluxPlan
from pipelines.flux.sampling import Grid, Shift, image_ids, schedule, unpack
from schemas.settings import ModelSettings

PREVIEW_TOKENS = 16  # the longer side of a preview, in tokens of 16 pixels


class FluxModel(Model):
    """The parts of a diffusers FluxPipeline, called by our own loop.

    `components` is a FluxPipeline used as a container; its `__call__` is never used.
    """

    def __init__(self, components: Any, max_sequence_length: int = 512) -> None:
        self._parts = components
        self._max_sequence_length = max_sequence_length
        self._device: torch.device = components.transformer.device
        self._dtype: torch.dtype = components.transformer.dtype
        self._takes_guidance: bool = components.transformer.config.guidance_embeds

    @classmethod
    def load(cls, source: Path | str, settings: ModelSettings) -> Self:
        dtype: torch.dtype = getattr(torch, settings.dtype)
        components = FluxPipeline.from_pretrained(source, dtype=dtype)
        components.set_progress_bar_config(disable=True)
        return cls(components.to(settings.device), settings.max_sequence_length)

    @torch.inference_mode()
    def encode_prompt(self, prompt: str) -> Conditioning:
        """The T5 tokens and the pooled CLIP embedding of a prompt."""
        tokens, pooled, _ = self._parts.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            device=self._device,
            max_sequence_length=self._max_sequence_length,
        )
        return Conditioning(tokens[0], pooled[0])

    def sigmas(self, steps: int, grid: Grid, shift: Shift | None = None) -> tuple[float, ...]:
        """The checkpoint's own schedule for a picture of this size."""
        config = self._parts.scheduler.config
        if not config.use_dynamic_shifting:
            return schedule(steps, None)
        shift = shift or Shift(
            config.base_shift,
            config.max_shift,
            config.base_image_seq_len,
            config.max_image_seq_len,
        )
        return schedule(steps, shift.mu(grid.tokens))

    def to_device(self, latents: Tensor) -> Tensor:
        """Latents as samples hold them: float32 on the model's device."""
        return latents.to(self._device, torch.float32)

    def predict(self, samples: Sequence[Sample]) -> Sequence[Tensor]:
        plans = [plan_of(sample) for sample in samples]
        sigmas = torch.tensor(
            [plan.sigmas[sample.step] for plan, sample in zip(plans, samples, strict=True)],
            device=self._device,
        )
        guidance = torch.tensor([plan.guidance for plan in plans], device=self._device)
        text_length = len(plans[0].conditioning.tokens)
        velocity: Tensor = self._parts.transformer(
            hidden_states=torch.stack([sample.latents for sample in samples]).to(self._dtype),
            # diffusers rounds the timestep in thousandths to the model's dtype; so do we
            timestep=(sigmas * 1000).to(self._dtype) / 1000,
            guidance=guidance if self._takes_guidance else None,
            pooled_projections=torch.stack([plan.conditioning.pooled for plan in plans]),
            encoder_hidden_states=torch.stack([plan.conditioning.tokens for plan in plans]),
            txt_ids=torch.zeros(text_length, 3, device=self._device, dtype=self._dtype),
            img_ids=image_ids(plans[0].grid).to(self._device, self._dtype),
            return_dict=False,
        )[0]
        return velocity.float().unbind()

    @torch.inference_mode()
    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Packed latents [tokens, 64] → pixels [3, height, width] in about [-1, 1], float32."""
        return self._decode(unpack(latents, grid))

    @torch.inference_mode()
    def decode_small(self, latents: Tensor, grid: Grid) -> Tensor:
        """As `decode`, shrunk to at most 256 pixels a side before the VAE sees it."""
        shrink = min(1.0, PREVIEW_TOKENS / max(grid.rows, grid.columns))
        size = [max(1, round(side * 2 * shrink)) for side in (grid.rows, grid.columns)]
        small = interpolate(unpack(latents, grid)[None], size=size, mode="area")[0]
        return self._decode(small)

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self._parts.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(scaled[None].to(vae.dtype), return_dict=False)[0]
        return pixels[0].float()


def plan_of(sample: Sample) -> FluxPlan:
    """The sample's plan, which is FLUX's."""
    assert isinstance(sample.plan, FluxPlan), f"{sample.name} is not a FLUX sample"
    return sample.plan
