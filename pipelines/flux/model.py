"""FLUX's resident weights: two text encoders, the transformer, the VAE."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import FluxPipeline
from PIL.Image import Image as Picture
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipelines.adapters.bank import LoraBank, LoraUse
from pipelines.adapters.cache import Cache
from pipelines.adapters.lora import Lora
from pipelines.adapters.lora import load as load_lora
from pipelines.base import Model
from pipelines.engine.sample import Sample
from pipelines.flux.lora_keys import targets, translator
from pipelines.flux.plan import Conditioning, FluxPlan
from pipelines.flux.sampling import Grid, Shift, image_ids, pack, schedule, unpack
from pipelines.images import fill, to_tensor
from schemas.settings import ModelSettings

PREVIEW_TOKENS = 16  # the longer side of a preview, in tokens of 16 pixels


class FluxModel(Model):
    """The parts of a diffusers FluxPipeline, called by our own loop.

    `components` is a FluxPipeline used as a container; its `__call__` is never used.
    """

    def __init__(self, components: Any, settings: ModelSettings) -> None:
        self.max_pixels = settings.limits.max_pixels
        self._parts = components
        self._max_sequence_length = settings.max_sequence_length
        self._device: torch.device = components.transformer.device
        self._dtype: torch.dtype = components.transformer.dtype
        self._takes_guidance: bool = components.transformer.config.guidance_embeds
        self._targets = targets(components.transformer, components.text_encoder, components.text_encoder_2)
        self._translate = translator(self._targets)
        self._loras: Cache[Lora] = Cache(settings.lora_ram_bytes)
        self._bank = LoraBank(self._linears("transformer"), settings.lora_rank)
        texts = self._linears("text_encoder") | self._linears("text_encoder_2")
        self._text_bank = LoraBank(texts, settings.lora_rank)

    @classmethod
    def load(cls, source: Path | str, settings: ModelSettings) -> Self:
        dtype: torch.dtype = getattr(torch, settings.dtype)
        components = FluxPipeline.from_pretrained(source, dtype=dtype)
        components.set_progress_bar_config(disable=True)
        return cls(components.to(settings.device), settings)

    @torch.inference_mode()
    def encode_prompt(self, prompt: str, loras: Sequence[LoraUse] = ()) -> Conditioning:
        """The T5 tokens and the pooled CLIP embedding of a prompt, with held adapters applied."""
        with self._text_bank.rows([loras]):
            tokens, pooled, _ = self._parts.encode_prompt(
                prompt=prompt,
                prompt_2=None,
                device=self._device,
                max_sequence_length=self._max_sequence_length,
            )
        return Conditioning(tokens[0], pooled[0])

    @torch.inference_mode()
    def encode_image(self, picture: Picture, grid: Grid) -> Tensor:
        """A picture, fitted to the grid → packed latents [tokens, 64], float32: the posterior's mode."""
        vae = self._parts.vae
        pixels = to_tensor(fill(picture, grid.width, grid.height))[None].to(self._device, vae.dtype)
        latents: Tensor = vae.encode(pixels).latent_dist.mode()[0].float()
        return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)

    def read_lora(self, path: Path) -> Lora:
        """A LoRA file, kept in RAM by its content's name. Raises AssetError that names the keys."""
        return self._loras.get(path.name, lambda: load_lora(path, self._translate, self._targets))

    def _linears(self, component: str) -> dict[str, nn.Linear]:
        """The layers of a component that may carry a LoRA, by their names in a Lora."""
        module = getattr(self._parts, component)
        prefix = f"{component}."
        paths = [name.removeprefix(prefix) for name in self._targets if name.startswith(prefix)]
        return {prefix + path: module.get_submodule(path) for path in paths}

    @contextmanager
    def holding(self, loras: Mapping[str, Lora]) -> Iterator[None]:
        """Adapters beside the transformer and the text encoders, for as long as the block lasts."""
        with ExitStack() as stack:
            for bank in (self._bank, self._text_bank):
                bank.hold(loras)
                stack.callback(bank.release, tuple(loras))
            yield

    def sigmas(self, steps: int, grid: Grid) -> tuple[float, ...]:
        """The checkpoint's own schedule for a picture of this size."""
        config = self._parts.scheduler.config
        if not config.use_dynamic_shifting:
            return schedule(steps, None)
        shift = Shift(
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
        with self._bank.rows([plan.loras for plan in plans]):
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
