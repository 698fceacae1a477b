"""One Stable Diffusion base model, resident, and the adapters beside it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image as Picture
from torch import Tensor
from torch.nn.functional import interpolate

from pipelines import vae
from pipelines.adapters.bank import LoraBank, LoraUse
from pipelines.adapters.lora import Lora
from pipelines.adapters.lora import load as load_lora
from pipelines.encodings import Encodings
from pipelines.engine.sample import Sample
from pipelines.images import fill, to_tensor
from pipelines.sd import controlnet_file, ic_light, ip_adapter_file
from pipelines.sd.controlnet_file import ControlNetConfig
from pipelines.sd.embeddings import TokenEmbedding
from pipelines.sd.embeddings import read as read_embedding
from pipelines.sd.grid import Grid
from pipelines.sd.ic_light import IcLight
from pipelines.sd.image_attention import cross_attention
from pipelines.sd.ip_adapter import IpAdapter
from pipelines.sd.lora_keys import targets, translator
from pipelines.sd.parts import Parts
from pipelines.sd.plan import Row, SdPlan
from pipelines.sd.text import Encoding, Known, encode
from pipelines.sd.unet import AdaptedUnet
from pipelines.speed.denoiser import Denoiser, channels_last, staged_rows
from schemas.settings import SpeedSettings

TIME_IDS = (1024, 1024, 0, 0, 1024, 1024)
TEXT_TOKENS = 77  # of a prompt that CLIP reads at once
PREVIEW_CELLS = 32  # the longer side of a preview, in cells of 8 pixels


class Base:
    """The components of a checkpoint, called by our own loop.

    `name` tells it apart from all others. A forward of its UNet holds at most `batch_tokens` image tokens.
    `text_bank` and `origin` are those of another base with the same text encoders and the same VAE. `speed`
    says how its forwards run; without it as they are.
    """

    def __init__(
        self,
        name: str,
        parts: Parts,
        encodings: Encodings[Encoding],
        lora_rank: int,
        batch_tokens: int,
        text_bank: LoraBank | None = None,
        origin: object = None,
        speed: SpeedSettings | None = None,
    ) -> None:
        speed = speed or SpeedSettings()
        self.name = name
        self.kind = parts.kind
        self.scheduler_config = parts.scheduler_config
        self._parts = parts
        self._encodings = encodings
        self._origin = origin or object()  # stands for the encoders; a loaded model's is never another's
        self._device: torch.device = parts.unet.device
        self._dtype: torch.dtype = parts.unet.dtype
        self.channels: int = parts.unet.config.in_channels  # 4, and more that are read beside the latents
        self.cross_attention = cross_attention(parts.unet)
        self.targets = targets(parts.unet, parts.text_encoders)
        self._translate = translator(self.targets)
        unet, texts = self._layers("unet"), self._layers("text_encoder") | self._layers("text_encoder_2")
        if speed.channels_last:
            channels_last(parts.unet)
            channels_last(parts.vae)
        if speed.compile_vae:
            vae.compile_decoder(parts.vae)
        staged = staged_rows(speed, batch_tokens)
        self._bank = LoraBank(unet, lora_rank, staged_rows=staged)
        self._text_bank = text_bank or LoraBank(texts, lora_rank)
        self._unet = AdaptedUnet(parts.unet, self._bank, batch_tokens, speed)
        self._make_like_this = partial(
            Base,
            encodings=encodings,
            lora_rank=lora_rank,
            batch_tokens=batch_tokens,
            text_bank=self._text_bank,
            origin=self._origin,
        )

    @property
    def tokenizer(self) -> Any:
        """The first of its tokenizers."""
        return self._parts.tokenizers[0]

    @property
    def unet_config(self) -> Any:
        """diffusers' own."""
        return self._parts.unet.config

    @property
    def denoiser(self) -> Denoiser:
        """How the UNet is run."""
        return self._unet.denoiser

    def warm(self, grid: Grid, rows: int) -> None:
        """Make forwards of so many rows ready."""
        self._unet.warm([self._empty_row(grid)] * rows)

    def attention_shape(self, grid: Grid) -> tuple[int, int, int, int]:
        """Of the widest queries that the UNet has for a picture with guidance: rows, heads, tokens, size."""
        for module in self._parts.unet.modules():
            if type(module).__name__ == "BasicTransformerBlock":
                heads: int = module.attn1.heads
                level = 1 if self.kind != "sdxl" else 2  # SDXL's first level has no attention
                return 2, heads, grid.rows // level * (grid.columns // level), module.attn1.inner_dim // heads
        raise AssertionError("the UNet has no transformer")

    def _empty_row(self, grid: Grid) -> Row:
        config = self._parts.unet.config
        zeros = partial(torch.zeros, device=self._device, dtype=self._dtype)
        pooled = None
        if config.addition_embed_type == "text_time":
            beside = len(TIME_IDS) * config.addition_time_embed_dim
            pooled = zeros(config.projection_class_embeddings_input_dim - beside)
        text = Encoding(zeros(TEXT_TOKENS, config.cross_attention_dim), pooled)
        latents = torch.zeros(self.channels, grid.rows, grid.columns, device=self._device)
        return Row(latents, 500.0, text, TIME_IDS, (), (), ())

    @torch.inference_mode()
    def encode_texts(
        self,
        texts: Sequence[str],
        loras: Sequence[LoraUse] = (),
        *,
        weighted: bool = False,
        clip_skip: int = 0,
        embeddings: Sequence[TokenEmbedding] = (),
    ) -> list[Encoding]:
        """As `text.encode`, with held adapters applied."""
        acting = self._text_bank.acting(loras)
        known = Known(self._encodings.texts, (self._origin, acting))
        with self._text_bank.rows([acting]):
            return encode(
                self._parts, texts, known, weighted=weighted, clip_skip=clip_skip, embeddings=embeddings
            )

    @torch.inference_mode()
    def encode_image(self, picture: Picture, grid: Grid) -> Tensor:
        """A picture, fitted to the grid → latents [4, rows, columns], float32: the posterior's mode.

        They are shared with others and stay as they are.
        """
        scale: float = self._parts.vae.config.scaling_factor
        return self._encodings.picture(
            self._origin,
            fill(picture, grid.width, grid.height),
            lambda fitted: vae.encode(self._parts.vae, to_tensor(fitted)) * scale,
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [4, rows, columns] → pixels [3, height, width] in about [-1, 1], float32."""
        return vae.decode(self._parts.vae, latents / self._parts.vae.config.scaling_factor)

    @torch.inference_mode()
    def decode_together(self, samples: Sequence[Sample]) -> Mapping[Sample, Tensor]:
        """As Model.decode_together, for samples that all ran on this base."""
        scale: float = self._parts.vae.config.scaling_factor
        pixels = vae.decode_together(self._parts.vae, [each.latents / scale for each in samples])
        return {samples[place]: each for place, each in pixels.items()}

    def decode_small(self, latents: Tensor) -> Tensor:
        """As `decode`, shrunk to at most 256 pixels a side before the VAE sees it."""
        rows, columns = latents.shape[1:]
        shrink = min(1.0, PREVIEW_CELLS / max(rows, columns))
        size = [max(1, round(side * shrink)) for side in (rows, columns)]
        return self.decode(interpolate(latents[None], size=size, mode="area")[0])

    def read_lora(self, path: Path) -> Lora:
        """A LoRA file. Raises AssetError that names the keys."""
        return load_lora(path, self._translate, self.targets)

    def read_embedding(self, path: Path, tokens: Sequence[str]) -> tuple[TokenEmbedding, ...]:
        """A textual inversion. Raises AssetError that says what does not fit."""
        return read_embedding(path, tokens, self._parts)

    def read_ic_light(self, path: Path) -> IcLight:
        """IC-Light's offsets for this UNet. Raises AssetError that says what does not fit."""
        return ic_light.read(path, self._parts.unet)

    def lit_anew(self, name: str, offsets: IcLight) -> "Base":
        """This model with another UNet, IC-Light's. The other components are the same objects."""
        return self._make_like_this(name, replace(self._parts, unet=offsets.apply(self._parts.unet)))

    def load_ip_adapter(self, path: Path) -> IpAdapter:
        """An IP-Adapter on the model's device. Raises AssetError that names the keys."""
        return ip_adapter_file.load(path, self._parts.unet)

    def load_controlnet(self, path: Path, config: ControlNetConfig | None = None) -> Any:
        """A ControlNetModel on the model's device. Raises AssetError that names the keys."""
        return controlnet_file.load(path, self._parts.unet, config)

    @contextmanager
    def holding(self, loras: Mapping[str, Lora]) -> Iterator[None]:
        """Adapters beside the UNet and the text encoders, for as long as the block lasts."""
        with ExitStack() as stack:
            for bank in (self._bank, self._text_bank):
                bank.hold(loras)
                stack.callback(bank.release, tuple(loras))
            yield

    def as_weights(self, tensor: Tensor) -> Tensor:
        """On the model's device in its dtype."""
        return tensor.to(self._device, self._dtype)

    def to_device(self, tensor: Tensor) -> Tensor:
        """As samples hold their latents: float32 on the model's device."""
        return tensor.to(self._device, torch.float32)

    def predict(self, samples: Sequence[Sample]) -> Sequence[Tensor]:
        """As Model.predict, for samples that all run on this base."""
        asked = [plan_of(sample).rows(sample.step, sample.latents) for sample in samples]
        answers = iter(self._unet.predict([row for rows in asked for row in rows]))
        return [
            plan_of(sample).joined(sample.step, sample.latents, [next(answers) for _ in rows])
            for sample, rows in zip(samples, asked, strict=True)
        ]

    def _layers(self, component: str) -> dict[str, Any]:
        """The layers of a component that may carry a LoRA, by their names in a Lora."""
        encoders = dict(zip(("text_encoder", "text_encoder_2"), self._parts.text_encoders, strict=False))
        components = {"unet": self._parts.unet, **encoders}
        prefix = f"{component}."
        paths = [name.removeprefix(prefix) for name in self.targets if name.startswith(prefix)]
        return {prefix + path: components[component].get_submodule(path) for path in paths}


def plan_of(sample: Sample) -> SdPlan:
    """The sample's plan, which is Stable Diffusion's."""
    assert isinstance(sample.plan, SdPlan), f"{sample.name} is not a Stable Diffusion sample"
    return sample.plan
