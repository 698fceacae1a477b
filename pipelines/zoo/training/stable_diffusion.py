"""Stable Diffusion's UNets on the world: 1.5's, and XL's, which begins as 1.5's. They predict velocities."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import CLIPTextModelWithProjection

from pipelines.zoo import world
from pipelines.zoo.training import autoencoder, text
from pipelines.zoo.training.loop import Draw, Job, Report, fit

Kind = Literal["sd15", "sdxl"]

# The published models' schedule but for its end: with theirs, the last step still shows a picture's mean, and
# these flat pictures are little else.
_BETAS = (0.00085, 0.02)
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": _BETAS[0],
    "beta_end": _BETAS[1],
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
_STEPS = 1000
_LATE = 2.0  # how far training's times are drawn towards noise
_UNSAID = 0.12
SCENES = 2000
_CAPTIONS = 2
_TIME_IDS, _TIME_WIDTH = 6, 16

_COMMON = {
    "sample_size": world.SIDE_PX // 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": (2, 4),  # heads, whatever diffusers calls them
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_CONFIGS: dict[Kind, dict[str, Any]] = {
    "sd15": {**_COMMON, "cross_attention_dim": text.WIDTH},
    "sdxl": {
        **_COMMON,
        "cross_attention_dim": 2 * text.WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _TIME_WIDTH,
        "projection_class_embeddings_input_dim": text.WIDTH + _TIME_IDS * _TIME_WIDTH,
    },
}


def make(kind: Kind) -> Any:
    """An untrained UNet."""
    torch.manual_seed(6)
    unet = UNet2DConditionModel(**_CONFIGS[kind])
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if ".conv2." in name or name.startswith("conv_out") or ".proj_out." in name:
                weight.zero_()
    return unet


def begin_as(unet: Any, other: Any) -> None:
    """Copy what fits: a convolution of one pixel is a linear layer, a shorter text comes first."""
    known = other.state_dict()
    with torch.no_grad():
        for name, own in unet.state_dict().items():
            if name not in known:
                continue
            theirs = known[name].squeeze(-1).squeeze(-1) if known[name].ndim > own.ndim else known[name]
            if theirs.shape == own.shape:
                own.copy_(theirs)
            elif theirs.shape[:1] == own.shape[:1] and theirs.ndim == own.ndim == 2:
                own[:, : theirs.shape[1]].copy_(theirs)


@dataclass(frozen=True, slots=True)
class Said:
    """Captions as a UNet reads them."""

    tokens: Tensor  # [captions, 77, width]
    pooled: Tensor  # [captions, width], XL's second encoder's

    def __getitem__(self, index: Any) -> "Said":
        return Said(self.tokens[index], self.pooled[index])


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learned from: latents [scenes, 4, rows, columns] and captions, `each` of them to a scene."""

    kind: Kind
    pictures: Any  # [scenes, side, side, 3] of bytes
    latents: Tensor
    said: Said
    silence: Said
    each: int


@torch.no_grad()
def read(kind: Kind, clip: Any, texts: list[str], device: str) -> Said:
    tokens, pooled = [], []
    for at in range(0, len(texts), 64):
        states = []
        for pad in ("<|endoftext|>", "!") if kind == "sdxl" else ("<|endoftext|>",):
            ids = text.clip_tokenizer(pad)(
                texts[at : at + 64], padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            seen = clip(ids.to(device), output_hidden_states=True)
            states.append(seen.hidden_states[-2] if kind == "sdxl" else seen.last_hidden_state)
        tokens.append(torch.cat(states, -1))
        pooled.append(seen.text_embeds)
    return Said(torch.cat(tokens), torch.cat(pooled))


def lesson(kind: Kind, vae: Any, clip: Any, device: str, style: str = "plain", count: int = SCENES) -> Lesson:
    rng = np.random.default_rng(7)
    scenes = [world.scene(rng).styled(style) for _ in range(count)]
    pictures = np.stack([world.draw(scene) for scene in scenes])
    latents = autoencoder.encode(vae, pictures, device)
    texts = [world.caption(scene, rng) for scene in scenes for _ in range(_CAPTIONS)]
    clip = clip.to(device).eval()
    said = read(kind, clip, [*texts, ""], device)
    return Lesson(kind, pictures, latents, said, said[-1:], _CAPTIONS)


@dataclass(frozen=True, slots=True)
class Case:
    """A noisy picture on its way, and what is to be predicted."""

    scenes: Tensor
    noisy: Tensor
    time: Tensor
    target: Tensor
    said: Said


def case(lesson: Lesson, draw: Draw, count: int = 32, unsaid: float = _UNSAID, late: float = _LATE) -> Case:
    """`unsaid`: how many have no caption; `late`: how far times are drawn towards noise, below 1 towards the
    picture."""
    rng, device = draw.numpy, lesson.latents.device
    scenes = torch.from_numpy(rng.integers(0, len(lesson.latents), count)).to(device)
    chosen = scenes * lesson.each + torch.from_numpy(rng.integers(0, lesson.each, count)).to(device)
    silent = torch.from_numpy(rng.random(count) < unsaid).to(device)
    chosen = torch.where(silent, len(lesson.said.pooled) - 1, chosen)  # the last is no caption
    latents = lesson.latents[scenes]
    noise = torch.randn(latents.shape, generator=draw.torch, device=device)
    even = torch.from_numpy(rng.random(count)).to(device, torch.float32)
    time = (_STEPS * late * even / (1 + (late - 1) * even)).long().clamp(0, _STEPS - 1)
    kept = _kept(device)[time][:, None, None, None]
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    target = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    return Case(scenes, noisy, time, target, lesson.said[chosen])


def _kept(device: Any) -> Tensor:
    """How much of a picture's variance is left at each time."""
    betas = torch.linspace(_BETAS[0] ** 0.5, _BETAS[1] ** 0.5, _STEPS, device=device) ** 2
    return (1 - betas).cumprod(0)


def predict(unet: Any, kind: Kind, noisy: Tensor, time: Tensor, said: Said, **more: Any) -> Tensor:
    """What the UNet predicts for latents [n, 4, rows, columns] of whole pictures."""
    predicted: Tensor = unet(
        noisy,
        time,
        encoder_hidden_states=said.tokens,
        added_cond_kwargs=added(kind, noisy, said),
        return_dict=False,
        **more,
    )[0]
    return predicted


def added(kind: Kind, noisy: Tensor, said: Said) -> dict[str, Tensor] | None:
    """What XL reads beside the tokens."""
    if kind == "sd15":
        return None
    height, width = (8 * side for side in noisy.shape[-2:])
    ids = torch.tensor([[height, width, 0, 0, height, width]], device=noisy.device, dtype=torch.float32)
    return {"text_embeds": said.pooled, "time_ids": ids.expand(len(noisy), -1)}


def train(
    kind: Kind,
    lesson: Callable[[], Lesson],
    steps: int,
    folder: Path,
    report: Report,
    device: str,
    start: Any = None,
) -> Any:
    """A trained UNet; `start` is another kind's to begin as."""
    unet = make(kind)
    if start is not None:
        begin_as(unet, start)
    return fit(Job(kind, unet, loss_of(unet, lesson), steps), folder, report, device)


def loss_of(
    unet: Any, lesson: Callable[[], Lesson], count: int = 32, late: float = _LATE
) -> Callable[[Draw], Tensor]:
    """What falls when the UNet draws what the lesson shows."""

    def loss(draw: Draw) -> Tensor:
        each = case(lesson(), draw, count, late=late)
        return mse_loss(predict(unet, lesson().kind, each.noisy, each.time, each.said), each.target)

    return loss


def pipeline(kind: Kind, clip: Any, vae: Any, unet: Any) -> Any:
    """All of it as diffusers has it."""
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULE)
    plain = text.plain(clip)
    if kind == "sd15":
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=plain,
            tokenizer=text.clip_tokenizer(),
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    second: Any = CLIPTextModelWithProjection(clip.config).to(clip.dtype)
    second.load_state_dict(clip.state_dict())
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=plain,
        text_encoder_2=second,
        tokenizer=text.clip_tokenizer(),
        tokenizer_2=text.clip_tokenizer("!"),
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
