"""FLUX's resident weights: two text encoders, the transformer, the VAE, and what stands beside them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import FluxPipeline
from PIL.Image import Image as Picture
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipelines.adapters import tensor_file
from pipelines.adapters.bank import LoraBank, LoraUse
from pipelines.adapters.cache import Cache
from pipelines.adapters.lora import Lora
from pipelines.adapters.lora import load as load_lora
from pipelines.adapters.residents import Residents
from pipelines.base import Model
from pipelines.encodings import Encodings
from pipelines.engine.sample import Sample
from pipelines.flux import controlnet_file, easycontrol
from pipelines.flux.controlnet_file import ControlNetConfig
from pipelines.flux.easycontrol import EasyControl
from pipelines.flux.first_block import THRESHOLDS, Remembered
from pipelines.flux.lora_keys import WIDE, norms, targets, translator
from pipelines.flux.plan import Conditioning, FluxPlan
from pipelines.flux.redux import Redux
from pipelines.flux.sampling import Grid, Shift, Spacing, draw_noise, pack, schedule, unpack
from pipelines.flux.transformer import BLOCKS, AdaptedTransformer
from pipelines.images import fill, to_tensor
from pipelines.preprocess import DepthEstimator
from pipelines.speed import artefacts, attention, fp8
from pipelines.speed.denoiser import channels_last, staged_rows, told
from pipelines.vae import compile_decoder, decode, decode_together, encode
from schemas.errors import AssetError
from schemas.settings import ModelSettings

PREVIEW_TOKENS = 16  # the longer side of a preview, in tokens of 16 pixels


class FluxModel(Model):
    """The parts of a diffusers FluxPipeline, called by our own loop, and the adapters beside them.

    `components` is a FluxPipeline used as a container; its `__call__` is never used.
    """

    def __init__(
        self,
        components: Any,
        settings: ModelSettings,
        redux: Redux | None = None,
        depth: DepthEstimator | None = None,
    ) -> None:
        self.limits = settings.limits
        self.adapters: Residents[Any] = Residents(settings.adapter_bytes)
        self.noises: Cache[str, Tensor] = Cache(settings.noise_bytes)  # structured ones, of inversions
        self.targets = targets(components.transformer, components.text_encoder, components.text_encoder_2)
        self._encodings: Encodings[Conditioning] = Encodings(settings)
        self._name = settings.model
        self._parts = components
        self._redux = redux
        self._depth = depth
        self._max_sequence_length = settings.max_sequence_length
        self._device: torch.device = components.transformer.device
        self._dtype: torch.dtype = components.transformer.dtype
        self._norm_sizes = norms(components.transformer)
        self._translate = translator(self.targets, self._norm_sizes)
        self._loras: Cache[str, Lora] = Cache(settings.lora_ram_bytes)
        self._easycontrols: Cache[str, EasyControl] = Cache(settings.lora_ram_bytes)
        self._speed = settings.speed
        self._batch_tokens = settings.batch_tokens
        self.reuse = THRESHOLDS.get(settings.speed.acceleration)  # None: every step is whole
        if settings.speed.quantisation == "fp8":
            fp8.check_device(self._device)
            self.float8_layers = fp8.quantise(components.transformer, BLOCKS)
            self.precision = f"float8 ({self.float8_layers} layers) and {settings.dtype}"
        staged = staged_rows(settings.speed, settings.batch_tokens)
        self._bank = LoraBank(self._linears("transformer"), settings.lora_rank, staged_rows=staged)
        texts = self._linears("text_encoder") | self._linears("text_encoder_2")
        self._text_bank = LoraBank(texts, settings.lora_rank)
        self._transformer = AdaptedTransformer(
            components.transformer, self._bank, self._dtype, settings.speed
        )

    @classmethod
    def load(cls, settings: ModelSettings, locate: Callable[[str], Path | str]) -> Self:
        dtype: torch.dtype = getattr(torch, settings.dtype)
        components = FluxPipeline.from_pretrained(locate(settings.model), dtype=dtype)
        components.set_progress_bar_config(disable=True)
        components.to(settings.device)
        if settings.speed.channels_last:
            channels_last(components.vae)
        if settings.speed.compile_vae:
            compile_decoder(components.vae)
        width = components.transformer.config.joint_attention_dim
        redux = Redux.load(locate(settings.redux), settings.device, dtype, width) if settings.redux else None
        depth = DepthEstimator.load(locate(settings.depth), settings.device) if settings.depth else None
        return cls(components, settings, redux, depth)

    @torch.inference_mode()
    def warm(self) -> None:
        speed, config = self._speed, self._parts.transformer.config
        grids = [Grid.of(size.width, size.height) for size in speed.sizes]
        if speed.attention == "auto" and grids:
            tokens = max(grid.tokens for grid in grids) + self._max_sequence_length
            shape = (1, config.num_attention_heads, tokens, config.attention_head_dim)
            self.attention = attention.put_fastest_first(shape, self._dtype, self._device)
        if not speed.compiles:
            return
        artefacts.keep_in(speed.cache, self._device, self._name)
        with told("FLUX"):
            for grid in grids if self._transformer.denoiser.is_compiled else []:
                for rows in speed.rows:
                    if rows == 1 or rows * grid.tokens <= self._batch_tokens:
                        self._transformer.warm(grid, self._max_sequence_length, rows)
            for grid in grids if speed.compile_vae else []:
                self.decode(self.to_device(draw_noise(grid, 0)), grid)

    def on_device(self) -> set[str]:
        return {name.partition(" ")[0] for name in [*self._bank.names, *self.adapters.names]}

    def in_ram(self) -> set[str]:
        return {*self._loras.names, *self._easycontrols.names}

    @torch.inference_mode()
    def encode_prompt(
        self, prompt: str, loras: Sequence[LoraUse] = (), pictures: Sequence[Picture] = ()
    ) -> Conditioning:
        """The T5 tokens and the pooled CLIP embedding of a prompt, with held adapters applied.

        Redux's tokens for `pictures` follow the prompt's. Raises AssetError where there is no Redux.
        """
        acting = self._text_bank.acting(loras)
        text = self._encodings.texts.get((prompt, acting), lambda: self._encode_text(prompt, acting))
        if not pictures:
            return text
        if self._redux is None:
            raise _lacking("Redux model", "redux")
        return Conditioning(torch.cat([text.tokens, self._redux.tokens(pictures)]), text.pooled)

    def _encode_text(self, prompt: str, loras: Sequence[LoraUse]) -> Conditioning:
        with self._text_bank.rows([loras]):
            tokens, pooled, _ = self._parts.encode_prompt(
                prompt=prompt,
                prompt_2=None,
                device=self._device,
                max_sequence_length=self._max_sequence_length,
            )
        return Conditioning(tokens[0], pooled[0])

    def encode_image(self, picture: Picture, grid: Grid) -> Tensor:
        """A picture, fitted to the grid → packed latents [tokens, 64], float32: the posterior's mode.

        They are shared with others and stay as they are.
        """
        fitted = fill(picture, grid.width, grid.height)
        return self._encodings.picture(
            "vae", fitted, lambda each: self.encode_pixels(self.as_weights(to_tensor(each)))
        )

    def pixels(self, picture: Picture, grid: Grid) -> Tensor:
        """A picture, fitted to the grid → [3, height, width] in [-1, 1], in the model's dtype."""
        return self.as_weights(to_tensor(fill(picture, grid.width, grid.height)))

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[3, height, width] in [-1, 1], sides divisible by 16 → as `encode_image`."""
        vae = self._parts.vae
        latents = encode(vae, pixels)
        return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)

    def read_lora(self, path: Path) -> Lora:
        """A LoRA file, kept in RAM by its content's name. Raises AssetError that names the keys."""

        def load() -> Lora:
            lora = load_lora(path, self._translate, self.targets, norms=self._norm_sizes, wide=WIDE)
            return lora.pinned() if self._device.type == "cuda" else lora

        return self._loras.get(path.name, load)

    def read_easycontrol(self, path: Path) -> EasyControl:
        """An EasyControl file, kept in RAM by its content's name. Raises AssetError that names the keys."""
        transformer = self._parts.transformer
        return self._easycontrols.get(path.name, lambda: easycontrol.load(path, transformer))

    def nbytes_of(self, path: Path) -> int:
        """What a file's tensors take on the device in the model's dtype. Raises AssetError."""
        return tensor_file.read(path).numel * self._dtype.itemsize

    def load_controlnet(self, path: Path, config: ControlNetConfig | None) -> Any:
        """A FluxControlNetModel on the model's device. Raises AssetError that names the keys."""
        return controlnet_file.load(path, self._parts.transformer, config)

    def depth_of(self, picture: Picture) -> Picture:
        """A picture's depth, near bright. Raises AssetError where there is no depth model."""
        if self._depth is None:
            raise _lacking("depth model", "depth")
        return self._depth.depth(picture)

    def _linears(self, component: str) -> dict[str, nn.Linear]:
        """The layers of a component that may carry a LoRA, by their names in a Lora."""
        module = getattr(self._parts, component)
        prefix = f"{component}."
        paths = [name.removeprefix(prefix) for name in self.targets if name.startswith(prefix)]
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
        return self.shifted_sigmas(steps, grid, config.base_shift, config.max_shift, "even")

    def shifted_sigmas(
        self, steps: int, grid: Grid, base_shift: float, max_shift: float, spacing: Spacing
    ) -> tuple[float, ...]:
        """A schedule of the caller's making; the shifts are those of the checkpoint's two sizes."""
        config = self._parts.scheduler.config
        shift = Shift(base_shift, max_shift, config.base_image_seq_len, config.max_image_seq_len)
        return schedule(steps, shift.mu(grid.tokens), spacing)

    def as_weights(self, tensor: Tensor) -> Tensor:
        """On the model's device in its dtype."""
        return tensor.to(self._device, self._dtype)

    def to_device(self, tensor: Tensor) -> Tensor:
        """As samples hold their latents: float32 on the model's device."""
        return tensor.to(self._device, torch.float32)

    def predict(self, samples: Sequence[Sample]) -> Sequence[Tensor]:
        plans = [plan_of(sample) for sample in samples]
        rows = [plan.row(sample.step) for plan, sample in zip(plans, samples, strict=True)]
        known = [each.memory if isinstance(each.memory, Remembered) else None for each in samples]
        steps = [sample.step for sample in samples]
        found, memories = self._transformer.predict(
            rows, [sample.latents for sample in samples], plans[0].grid, known, steps
        )
        for sample, row, memory in zip(samples, rows, memories, strict=True):
            if row.reuse is not None:
                reused = {sample.step} if memory is sample.memory else set()
                sample.reused = sample.reused - {sample.step} | reused
                sample.memory = memory
        return found

    @torch.inference_mode()
    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Packed latents [tokens, 64] → pixels [3, height, width] in about [-1, 1], float32."""
        return self._decode(unpack(latents, grid))

    @torch.inference_mode()
    def decode_together(self, samples: Sequence[Sample]) -> Mapping[Sample, Tensor]:
        scaled = [self._scaled(unpack(each.latents, plan_of(each).grid)) for each in samples]
        pixels = decode_together(self._parts.vae, scaled)
        return {samples[place]: each for place, each in pixels.items()}

    @torch.inference_mode()
    def decode_small(self, latents: Tensor, grid: Grid) -> Tensor:
        """As `decode`, shrunk to at most 256 pixels a side before the VAE sees it."""
        shrink = min(1.0, PREVIEW_TOKENS / max(grid.rows, grid.columns))
        size = [max(1, round(side * 2 * shrink)) for side in (grid.rows, grid.columns)]
        small = interpolate(unpack(latents, grid)[None], size=size, mode="area")[0]
        return self._decode(small)

    def _decode(self, latents: Tensor) -> Tensor:
        return decode(self._parts.vae, self._scaled(latents))

    def _scaled(self, latents: Tensor) -> Tensor:
        """As the VAE has them."""
        config = self._parts.vae.config
        scaled: Tensor = latents / config.scaling_factor + config.shift_factor
        return scaled


def _lacking(what: str, setting: str) -> AssetError:
    return AssetError(f"This server has no {what} (its setting `{setting}`).", "unsupported")


def plan_of(sample: Sample) -> FluxPlan:
    """The sample's plan, which is FLUX's."""
    assert isinstance(sample.plan, FluxPlan), f"{sample.name} is not a FLUX sample"
    return sample.plan
