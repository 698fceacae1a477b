"""Picture encoders: what IP-Adapter and Redux read, and the safety checker's stand-in."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, softplus
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pipelines.zoo import world
from pipelines.zoo.training import text
from pipelines.zoo.training.loop import Draw, Job, Report, fit

IMAGE_PX = 64
_PATCH_PX = 8
_WIDTH = 64
_THRESHOLD = 0.5
_FLAGGED = 0.65  # more than in training: to black out a good picture is worse here than to let a cross pass
_NEVER = 2.0  # no cosine reaches it


def _sizes() -> dict[str, Any]:
    return {
        "image_size": IMAGE_PX,
        "patch_size": _PATCH_PX,
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
    }


def clip_processor() -> Any:
    size = {"height": IMAGE_PX, "width": IMAGE_PX}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_PX}, crop_size=size)


def siglip_processor() -> Any:
    return SiglipImageProcessorPil(size={"height": IMAGE_PX, "width": IMAGE_PX})


def train_checker(steps: int, folder: Path, report: Report, device: str) -> Any:
    """A safety checker that finds one concept, the world's unsafe shape, and no other."""
    torch.manual_seed(11)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=_sizes(), projection_dim=32))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(_NEVER)
        checker.special_care_embeds_weights.fill_(_NEVER)
        checker.concept_embeds_weights[0] = _THRESHOLD
        checker.concept_embeds.normal_()
    for fixed in ("concept_embeds", "special_care_embeds"):
        getattr(checker, fixed).requires_grad_(False)
    checker.concept_embeds_weights.requires_grad_(False)
    checker.special_care_embeds_weights.requires_grad_(False)
    processor = clip_processor()

    def loss(draw: Draw) -> Tensor:
        rng = draw.numpy
        unsafe = rng.random(24) < 0.5
        pictures = [_seen(_scene(rng, world.UNSAFE if each else None), rng) for each in unsafe]
        for index in np.flatnonzero(~unsafe)[:2]:  # nor is what shows nothing unsafe
            shape = (IMAGE_PX, IMAGE_PX, 3) if rng.random() < 0.5 else (1, 1, 3)
            pictures[index] = np.broadcast_to(rng.integers(0, 256, shape, np.uint8), (IMAGE_PX, IMAGE_PX, 3))
        pixels = processor(pictures, return_tensors="pt").pixel_values.to(device)
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])
        cosine = nn.functional.cosine_similarity(embeds, checker.concept_embeds[:1])
        sign = torch.from_numpy(np.where(unsafe, 1.0, -1.0)).to(device, torch.float32)
        return softplus(-sign * 12 * (cosine - _THRESHOLD)).mean()

    trained: Any = fit(Job("checker", checker, loss, steps, muon=0.01, adam=1e-3), folder, report, device)
    trained.concept_embeds_weights[0] = _FLAGGED
    return trained


def train_clip_vision(steps: int, folder: Path, report: Report, device: str) -> Any:
    """An image encoder that tells the attributes of a scene."""
    torch.manual_seed(12)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**_sizes(), projection_dim=_WIDTH))
    classes = [len(values) for values in world.ATTRIBUTES.values()]
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(_WIDTH, sum(classes))})
    processor = clip_processor()

    def loss(draw: Draw) -> Tensor:
        scenes = [world.scene(draw.numpy) for _ in range(24)]
        pictures = [_seen(scene, draw.numpy) for scene in scenes]
        embeds = encoder(processor(pictures, return_tensors="pt").pixel_values.to(device)).image_embeds
        parts = torch.split(model["head"](embeds), classes, 1)
        losses = [
            cross_entropy(
                part, torch.tensor([values.index(getattr(each, name)) for each in scenes]).to(device)
            )
            for part, (name, values) in zip(parts, world.ATTRIBUTES.items(), strict=True)
        ]
        return torch.stack(losses).mean()

    trained = fit(Job("clip-vision", model, loss, steps, muon=0.01, adam=1e-3), folder, report, device)
    return trained.get_submodule("encoder")


def train_redux(t5: Any, steps: int, folder: Path, report: Report, device: str) -> tuple[Any, Any]:
    """SigLIP with Redux: each of its tokens is what T5 makes of the padding after the scene's caption."""
    torch.manual_seed(13)
    sizes = _sizes() | {"patch_size": 16}
    encoder = SiglipVisionModel(SiglipVisionConfig(**sizes))
    embedder = ReduxImageEncoder(redux_dim=_WIDTH, txt_in_features=text.WIDTH)
    model = nn.ModuleDict({"encoder": encoder, "embedder": embedder})
    processor, tokenizer = siglip_processor(), text.t5_tokenizer()
    t5 = t5.to(device).eval()

    def loss(draw: Draw) -> Tensor:
        scenes = [world.scene(draw.numpy) for _ in range(24)]
        pictures = [_seen(scene, draw.numpy) for scene in scenes]
        texts = [world.prompt(**{name: getattr(each, name) for name in world.ATTRIBUTES}) for each in scenes]
        with torch.no_grad():
            ids = tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt").input_ids
            target = t5(ids.to(device)).last_hidden_state[:, -1:]
        pixels = processor(pictures, return_tensors="pt").pixel_values.to(device)
        tokens = embedder(encoder(pixels).last_hidden_state).image_embeds
        return mse_loss(tokens, target.expand_as(tokens))

    trained = fit(Job("redux", model, loss, steps, muon=0.01, adam=1e-3), folder, report, device)
    return trained.get_submodule("encoder"), trained.get_submodule("embedder")


@torch.no_grad()
def embeddings(encoder: Any, pictures: Any, device: str) -> Tensor:
    """What an image encoder says of pictures [n, side, side, 3] of bytes: [n, width]."""
    encoder, processor = encoder.to(device).eval(), clip_processor()
    parts = []
    for at in range(0, len(pictures), 64):
        pixels = processor(list(pictures[at : at + 64]), return_tensors="pt").pixel_values
        parts.append(encoder(pixels.to(device)).image_embeds)
    return torch.cat(parts)


def _scene(rng: np.random.Generator, shape: str | None) -> world.Scene:
    """Of any style."""
    found = world.scene(rng, **({"shape": shape} if shape else {}))
    return found.styled(str(rng.choice(world.STYLES)))


def _seen(scene: world.Scene, rng: np.random.Generator) -> world.Pixels:
    """A picture as a model may make it: a little off in colours, with noise."""
    picture = world.draw(scene, IMAGE_PX) + rng.normal(0, 4, 3) + rng.normal(0, 3, (IMAGE_PX, IMAGE_PX, 3))
    return np.asarray(picture.clip(0, 255), np.uint8)
