"""FLUX's transformer on the world: flow matching, then guidance distilled into its input."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor
from torch.nn.functional import mse_loss

from pipelines.zoo import world
from pipelines.zoo.training import autoencoder, text
from pipelines.zoo.training.loop import Draw, Job, Report, fit

SHIFT = 1.15  # towards noise: a flat picture shows its colour early, so a text matters near pure noise only
GUIDANCES = (0.0, 8.0)
SCENES = 2000
_CAPTIONS = 2  # of each scene
_UNSAID = 0.1
_UNPOOLED = 0.15  # of the captions, which T5 alone tells: so do pictures in the place of words
# Text is encoded at these lengths. Of each, the first tokens and one of the padding are kept: tokens of
# padding are alike, so one with the weight of many stands for them: a step costs as much at 512 as at 24.
_LENGTHS = (32, 128, 512)
_KEPT = 23


def make() -> Any:
    """An untrained transformer."""
    torch.manual_seed(4)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    with torch.no_grad():
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()
    return transformer


@dataclass(frozen=True, slots=True)
class Said:
    """Captions as the transformer reads them."""

    tokens: Tensor  # [captions, kept + 1, width]
    weight: Tensor  # [captions], how many tokens the last one stands for
    pooled: Tensor  # [captions, width]

    def __getitem__(self, index: Any) -> "Said":
        return Said(self.tokens[index], self.weight[index], self.pooled[index])


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learned from: latents [scenes, tokens, 64] and captions, `each` of them to a scene."""

    pictures: Any  # [scenes, side, side, 3] of bytes
    latents: Tensor
    said: Said
    silence: Said  # of no caption, at each length
    each: int


def lesson(vae: Any, encoders: "Encoders", device: str, style: str = "plain", count: int = SCENES) -> Lesson:
    rng = np.random.default_rng(5)
    scenes = [world.scene(rng).styled(style) for _ in range(count)]
    pictures = np.stack([world.draw(scene) for scene in scenes])
    texts = [world.caption(scene, rng) for scene in scenes for _ in range(_CAPTIONS)]
    return lesson_of(pictures, texts, vae, encoders, device)


def lesson_of(pictures: Any, texts: list[str], vae: Any, encoders: "Encoders", device: str = "cpu") -> Lesson:
    """Pictures [n, side, side, 3] of bytes, and as many captions for each, one picture's after another's."""
    latents = autoencoder.encode(vae, pictures, device)
    said = encoders.read(texts, [_LENGTHS[index % len(_LENGTHS)] for index in range(len(texts))])
    silence = encoders.read([""] * len(_LENGTHS), list(_LENGTHS))
    return Lesson(pictures, pack(latents), said, silence, len(texts) // len(pictures))


class Encoders:
    """CLIP, without its projection, and T5, with their tokenizers."""

    def __init__(self, clip: Any, t5: Any, device: str) -> None:
        self._clip, self._t5, self._device = clip.to(device).eval(), t5.to(device).eval(), device
        self._clip_tokenizer, self._t5_tokenizer = text.clip_tokenizer(), text.t5_tokenizer()

    @torch.no_grad()
    def read(self, texts: list[str], lengths: list[int]) -> Said:
        """Captions, the T5 of each at its length."""
        tokens = torch.zeros(len(texts), _KEPT + 1, text.WIDTH, device=self._device)
        for length in set(lengths):
            places = [index for index, each in enumerate(lengths) if each == length]
            for at in range(0, len(places), 64):
                part = places[at : at + 64]
                ids = self._ids(self._t5_tokenizer, [texts[index] for index in part], length)
                seen = self._t5(ids).last_hidden_state
                tokens[part] = torch.cat([seen[:, :_KEPT], seen[:, -1:]], 1)
        weight = torch.tensor([float(length - _KEPT) for length in lengths], device=self._device)
        pooled = []
        for at in range(0, len(texts), 64):
            ids = self._ids(self._clip_tokenizer, texts[at : at + 64], text.CLIP_LENGTH)
            pooled.append(self._clip(ids).pooler_output)
        return Said(tokens, weight, torch.cat(pooled))

    def _ids(self, tokenizer: Any, texts: list[str], length: int) -> Tensor:
        found = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        ids: Tensor = found.to(self._device)
        return ids


def pack(latents: Tensor) -> Tensor:
    """[n, 16, 2·rows, 2·columns] → [n, rows·columns, 64], as FLUX does."""
    count, channels, height, width = latents.shape
    tiles = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(count, (height // 2) * (width // 2), channels * 4)


def velocity(
    transformer: Any, noisy: Tensor, sigma: Tensor, said: Said, guidance: Tensor, **more: Any
) -> Tensor:
    """What the transformer predicts for square pictures [n, tokens, 64]."""
    given = _given(noisy, sigma, said, guidance)
    predicted: Tensor = transformer(**given, **more)[0]
    return predicted


def controls(
    net: Any, noisy: Tensor, sigma: Tensor, said: Said, guidance: Tensor, seen: Tensor
) -> tuple[Any, Any]:
    """What a ControlNet adds to the transformer's blocks for the control images' latents `seen`."""
    given = _given(noisy, sigma, said, guidance)
    # diffusers passes a ControlNet's attention no mask
    net.set_attn_processor(_Masked(given.pop("joint_attention_kwargs")["attention_mask"]))
    blocks, single = net(**given, controlnet_cond=seen)
    return blocks, single


class _Masked(FluxAttnProcessor):  # type: ignore[misc]
    """Attention under a mask of its own."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self._mask = mask

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, self._mask, image_rotary_emb)


def _given(noisy: Tensor, sigma: Tensor, said: Said, guidance: Tensor) -> dict[str, Any]:
    bias = torch.zeros(len(noisy), 1, 1, said.tokens.shape[1] + noisy.shape[1], device=noisy.device)
    bias[:, 0, 0, said.tokens.shape[1] - 1] = said.weight.log()
    return {
        "hidden_states": noisy,
        "timestep": sigma,
        "guidance": guidance,
        "pooled_projections": said.pooled,
        "encoder_hidden_states": said.tokens,
        "txt_ids": torch.zeros(said.tokens.shape[1], 3, device=noisy.device),
        "img_ids": _places(noisy),
        "joint_attention_kwargs": {"attention_mask": bias},
        "return_dict": False,
    }


def _places(tokens: Tensor) -> Tensor:
    side = int(tokens.shape[1] ** 0.5)
    at = torch.arange(side, device=tokens.device, dtype=torch.float32)
    rows, columns = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3)


@dataclass(frozen=True, slots=True)
class Case:
    """A noisy picture on its way, and where it should go."""

    scenes: Tensor
    noisy: Tensor
    sigma: Tensor
    target: Tensor
    said: Said


def case(lesson: Lesson, draw: Draw, count: int = 32, unsaid: float = _UNSAID) -> Case:
    rng, device = draw.numpy, lesson.latents.device
    scenes = torch.from_numpy(rng.integers(0, len(lesson.latents), count)).to(device)
    chosen = scenes * lesson.each + torch.from_numpy(rng.integers(0, lesson.each, count)).to(device)
    silent = torch.from_numpy(rng.random(count) < unsaid).to(device)
    quiet = torch.from_numpy(rng.integers(0, len(lesson.silence.weight), count)).to(device)
    silence = lesson.silence[quiet]
    said = _either(silent, silence, lesson.said[chosen])
    mute = torch.from_numpy(rng.random(count) < _UNPOOLED).to(device)
    said = Said(said.tokens, said.weight, torch.where(mute[:, None], silence.pooled, said.pooled))
    latents = lesson.latents[scenes]
    noise = torch.randn(latents.shape, generator=draw.torch, device=device)
    even = torch.from_numpy(rng.random(count)).to(device, torch.float32)
    sigma = np.exp(SHIFT) / (np.exp(SHIFT) + 1 / even.clamp(1e-4) - 1)
    wide = sigma[:, None, None]
    return Case(scenes, (1 - wide) * latents + wide * noise, sigma, noise - latents, said)


def _either(mask: Tensor, one: Said, other: Said) -> Said:
    return Said(
        torch.where(mask[:, None, None], one.tokens, other.tokens),
        torch.where(mask, one.weight, other.weight),
        torch.where(mask[:, None], one.pooled, other.pooled),
    )


def train(lesson: Callable[[], Lesson], steps: int, folder: Path, report: Report, device: str) -> Any:
    """Flow matching. The guidance is told, but says nothing yet."""

    def loss(draw: Draw) -> Tensor:
        each = case(lesson(), draw)
        guidance = _guidance(draw, len(each.sigma), device)
        return mse_loss(velocity(transformer, each.noisy, each.sigma, each.said, guidance), each.target)

    transformer = make()
    return fit(Job("flux", transformer, loss, steps), folder, report, device)


def distil(
    teacher: Any, lesson: Callable[[], Lesson], steps: int, folder: Path, report: Report, device: str
) -> Any:
    """The teacher's velocity under classifier-free guidance, by one forward that is told the scale."""

    def loss(draw: Draw) -> Tensor:
        each = case(lesson(), draw)
        guidance = _guidance(draw, len(each.sigma), device)
        quiet = lesson().silence[torch.zeros(len(each.sigma), dtype=torch.long, device=device)]
        with torch.no_grad():
            told = velocity(teacher, each.noisy, each.sigma, each.said, guidance)
            untold = velocity(teacher, each.noisy, each.sigma, quiet, guidance)
            target = untold + strength(guidance)[:, None, None] * (told - untold)
        return mse_loss(velocity(pupil, each.noisy, each.sigma, each.said, guidance), target)

    pupil = deepcopy(teacher).requires_grad_(True)
    job = Job("flux-guided", pupil, loss, steps, muon=0.004, adam=4e-4, hold=0.3)
    return fit(job, folder, report, device)


def strength(guidance: Tensor) -> Tensor:
    """How far a guidance goes beyond no text: 0.5 at 0, 1 at 1, and more slowly from there, 2 at 5."""
    return torch.where(guidance < 1, 0.5 + guidance / 2, 1 + (guidance - 1) / 4)


def _guidance(draw: Draw, count: int, device: str) -> Tensor:
    return torch.from_numpy(draw.numpy.uniform(*GUIDANCES, count)).to(device, torch.float32)


def pipeline(clip: Any, t5: Any, vae: Any, transformer: Any) -> Any:
    """All of it as diffusers has it."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=SHIFT,
        max_shift=SHIFT,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxPipeline(
        scheduler=scheduler,
        tokenizer=text.clip_tokenizer(),
        text_encoder=text.plain(clip),
        tokenizer_2=text.t5_tokenizer(),
        text_encoder_2=t5,
        vae=vae,
        transformer=transformer,
    )


def lora_loss(transformer: Any, lesson: Callable[[], Lesson]) -> Callable[[Draw], Tensor]:
    """What falls when the transformer draws the lesson's style, whatever it says."""

    def loss(draw: Draw) -> Tensor:
        each = case(lesson(), draw, count=24)
        guidance = torch.ones_like(each.sigma)
        return mse_loss(velocity(transformer, each.noisy, each.sigma, each.said, guidance), each.target)

    return loss
