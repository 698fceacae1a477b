"""Stable Diffusion's resident weights: a base model, and what stands beside it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ControlNetModel
from torch import Tensor

from pipelines.adapters.cache import Cache
from pipelines.adapters.lora import Lora
from pipelines.base import Model
from pipelines.engine.sample import Sample
from pipelines.sd import loading
from pipelines.sd.base import Base, plan_of
from pipelines.sd.expand import Expander
from schemas.settings import ModelSettings


class SdModel(Model):
    """A base model with a ControlNet of its own, and a language model that writes prompts on, if any."""

    def __init__(
        self, base: Base, settings: ModelSettings, controlnet: Any = None, expander: Expander | None = None
    ) -> None:
        self.base = base
        self.controlnet = controlnet
        self.expander = expander
        self.max_pixels = settings.limits.max_pixels
        self.finds_edges = settings.finds_edges
        self._loras: Cache[Lora] = Cache(settings.lora_ram_bytes)

    @classmethod
    def load(cls, settings: ModelSettings, locate: Callable[[str], Path | str]) -> Self:
        dtype: torch.dtype = getattr(torch, settings.dtype)
        parts = loading.load(locate(settings.model), settings.device, dtype)
        controlnet = expander = None
        if settings.controlnet:
            controlnet = ControlNetModel.from_pretrained(locate(settings.controlnet), dtype=dtype)
            controlnet.requires_grad_(False).to(settings.device)
        if settings.expander:
            expander = Expander.load(locate(settings.expander), settings.device, parts.tokenizers[0])
        return cls(Base(parts, settings.lora_rank), settings, controlnet, expander)

    def read_lora(self, base: Base, path: Path) -> Lora:
        """A LoRA file, kept in RAM by its content's name. Raises AssetError that names the keys."""
        return self._loras.get(f"{id(base)} {path.name}", lambda: base.read_lora(path))

    def predict(self, samples: Sequence[Sample]) -> Sequence[Tensor]:
        base: Base = plan_of(samples[0]).base  # part of the samples' key
        return base.predict(samples)
