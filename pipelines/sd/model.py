"""Stable Diffusion's resident weights: base models, and what stands beside them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ControlNetModel
from torch import Tensor

from pipelines.adapters import tensor_file
from pipelines.adapters.cache import Cache
from pipelines.adapters.lora import Lora
from pipelines.adapters.residents import Residents, Wanted
from pipelines.base import Model
from pipelines.encodings import Encodings
from pipelines.engine.sample import Sample
from pipelines.faces import FaceAnalyser
from pipelines.sd import image_encoder, loading
from pipelines.sd.base import Base, plan_of
from pipelines.sd.checkpoints import LIMITS
from pipelines.sd.expand import Expander
from pipelines.sd.grid import CHANNELS, Grid
from pipelines.sd.text import Encoding
from pipelines.speed import artefacts, attention
from pipelines.speed.denoiser import channels_last, told
from schemas.settings import ModelSettings, SpeedSettings


class SdModel(Model):
    """A base model, others that requests name, and all that acts beside them.

    `base` is the one of the settings and always resident; it is known by its source there. `controlnet` and
    the language model `expander`, which writes prompts on, are the settings' too. `adapters` are ControlNets,
    IP-Adapters, image encoders, and base models with IC-Light's offsets.
    """

    def __init__(
        self,
        settings: ModelSettings,
        source: Path | str,
        controlnet: Any = None,
        expander: Expander | None = None,
    ) -> None:
        self.controlnet = controlnet
        self.expander = expander
        self.limits = settings.limits
        self.finds_edges = settings.finds_edges
        self.adapters: Residents[Any] = Residents(settings.adapter_bytes)
        for name in ("quantisation", "acceleration"):
            if (wish := getattr(settings.speed, name)) != "none":
                raise ValueError(f"speed.{name}: {wish} is for FLUX")
        self._settings = settings
        self._source = source
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._loras: Cache[str, Lora] = Cache(settings.lora_ram_bytes)
        self._encodings: Encodings[Encoding] = Encodings(settings)
        self._faces = cache(partial(FaceAnalyser.load, device=settings.device))
        # those that requests bring along run as they are: nobody is to wait for a compiler
        own = self._wanted(str(source), source, speed=settings.speed)
        self.base = own.load()
        self._bases: Residents[Base] = Residents(max(0, settings.bases.memory_bytes - own.measure()))

    @classmethod
    def load(cls, settings: ModelSettings, locate: Callable[[str], Path | str]) -> Self:
        dtype: torch.dtype = getattr(torch, settings.dtype)
        model = cls(settings, locate(settings.model))
        if settings.controlnet:
            model.controlnet = ControlNetModel.from_pretrained(locate(settings.controlnet), dtype=dtype)
            model.controlnet.requires_grad_(False).to(settings.device)
            if settings.speed.channels_last:
                channels_last(model.controlnet)
        if settings.expander:
            tokenizer = model.base.tokenizer
            model.expander = Expander.load(locate(settings.expander), settings.device, tokenizer)
        return model

    def warm(self) -> None:
        speed, base = self._settings.speed, self.base
        device = torch.device(self._settings.device)
        grids = [Grid.of(size.width, size.height) for size in speed.sizes]
        if speed.attention == "auto" and grids:
            shape = base.attention_shape(max(grids, key=lambda grid: grid.rows * grid.columns))
            self.attention = attention.put_fastest_first(shape, self._dtype, device)
        if not speed.compiles:
            return
        artefacts.keep_in(speed.cache, device, self._settings.model)
        with told(self._settings.model):
            for grid in grids if base.denoiser.is_compiled else []:
                for rows in sorted({1, *(2 * each for each in speed.rows)}):  # with guidance each has two
                    if rows <= 2 or rows * grid.rows * grid.columns // 4 <= self._settings.batch_tokens:
                        base.warm(grid, rows)
            for grid in grids if speed.compile_vae else []:
                base.decode(torch.zeros(CHANNELS, grid.rows, grid.columns, device=device))

    def hold_base(
        self, path: Path, held: ExitStack, *, variant: str | None = None, unet: Path | None = None
    ) -> Base:
        """A base model, resident until `held` is closed: a folder or a file, or the settings' by its source.

        `variant` and `unet` as in `loading.inspect`. Waits for room. Raises AssetError.
        """
        source = self._located(path)
        name = " ".join(str(each) for each in (source, variant, unet) if each)
        if name == self.base.name:
            return self.base
        wanted = {name: self._wanted(name, source, variant, unet)}
        return held.enter_context(self._bases.holding(wanted))[name]

    def on_device(self) -> set[str]:
        names = [self.base.name, *self._bases.names, *self.adapters.names]
        return {self._settings.model, *(name.partition(" ")[0] for name in names)}

    def in_ram(self) -> set[str]:
        return {name.partition(" ")[0] for name in self._loras.names}

    def read_lora(self, base: Base, path: Path) -> Lora:
        """A LoRA file, kept in RAM by its content's name. Raises AssetError that names the keys."""
        return self._loras.get(f"{path.name} {base.name}", lambda: base.read_lora(path))

    def load_image_encoder(self, path: Path) -> image_encoder.ImageEncoder:
        """A folder with a config, or a file. Raises AssetError."""
        return image_encoder.load(path, self._settings.device, self._dtype)

    def faces(self, folder: Path) -> FaceAnalyser:
        """A face analysis, loaded once. Raises AssetError."""
        return self._faces(folder)

    def nbytes_of(self, path: Path) -> int:
        """What the weights in a file, or in a folder, take on the device. Raises AssetError."""
        files = path.glob("*.safetensors") if path.is_dir() else [path]
        return sum(tensor_file.read(file, limits=LIMITS).numel for file in files) * self._dtype.itemsize

    def predict(self, samples: Sequence[Sample]) -> Sequence[Tensor]:
        base: Base = plan_of(samples[0]).base  # part of the samples' key
        return base.predict(samples)

    def decode_together(self, samples: Sequence[Sample]) -> Mapping[Sample, Tensor]:
        by_base: dict[Base, list[Sample]] = {}
        for sample in samples:
            by_base.setdefault(plan_of(sample).base, []).append(sample)
        return {s: each for base, own in by_base.items() for s, each in base.decode_together(own).items()}

    def _located(self, path: Path) -> Path | str:
        """The settings' own model is called by its source there, wherever it lies."""
        return self._source if path == Path(self._settings.model) else path

    def _wanted(
        self,
        name: str,
        source: Path | str,
        variant: str | None = None,
        unet: Path | None = None,
        speed: SpeedSettings | None = None,
    ) -> Wanted[Base]:
        settings = self._settings
        blueprint = cache(partial(loading.inspect, source, self._dtype, variant=variant, unet=unet))

        def load() -> Base:
            parts = blueprint().load(settings.device)
            rank, tokens = settings.lora_rank, settings.batch_tokens
            return Base(name, parts, self._encodings, rank, tokens, speed=speed)

        return Wanted(lambda: blueprint().nbytes, load)
