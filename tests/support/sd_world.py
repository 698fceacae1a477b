"""The two endpoints on the trained embedded Stable Diffusion models, many requests at once."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from pipelines.sd import fast_sdxl_controlnet_canny_image_to_image, lora_image_to_image
from pipelines.sd.model import SdModel
from pipelines.zoo.training.inversion import TOKEN
from pipelines.zoo.world import SIDE_PX, Pixels
from schemas.endpoints import fast_sdxl_controlnet_canny_image_to_image as canny
from schemas.endpoints import lora_image_to_image as universal
from schemas.settings import ModelSettings
from tests.support.world import START, draw, folder, started

Kind = Literal["sd15", "sdxl"]

STEPS = 16


@cache
def model(kind: Kind) -> SdModel:
    known: dict[str, Any] = {"model": f"zoo:{kind}-world", "endpoints": ("any",)}
    if kind == "sdxl":
        known["controlnet"] = "zoo:sdxl-world-canny"
    return SdModel.load(ModelSettings.model_validate(known), folder)


def drawn(kind: Kind, prompts: Sequence[str], seed: int, files: Any = None, **fields: Any) -> list[Pixels]:
    """From text alone; picture i has seed + i. `files` are what `fields` name."""
    blank = np.full((SIDE_PX, SIDE_PX, 3), 128, np.uint8)
    return remade(kind, prompts, [blank] * len(prompts), seed, files, **{"noise_strength": 1} | fields)


def remade(
    kind: Kind, prompts: Sequence[str], starts: Sequence[Pixels], seed: int, files: Any = None, **fields: Any
) -> list[Pixels]:
    """From pictures; `files` are what `fields` name besides."""
    known = {"model_name": kind, "image_url": START, "num_inference_steps": STEPS}
    wishes = [
        universal.Input.model_validate(known | fields | {"prompt": prompt, "seed": seed + number})
        for number, prompt in enumerate(prompts)
    ]
    named = started(starts, **{kind: folder(f"{kind}-world")}, **(files or {}))
    return draw(lora_image_to_image.Pipeline(model(kind)), wishes, *named)


def styled(kind: Kind, prompts: Sequence[str], seed: int, style: str, scale: float) -> list[Pixels]:
    """From text alone, with the style's LoRA, at a guidance that styles stand."""
    name = f"{kind}-world-{style}"
    files = {"style": folder(name) / f"{name}.safetensors"}
    named = {"loras": [{"path": "style", "scale": scale}], "guidance_scale": 2.5}
    return drawn(kind, prompts, seed, files, **named)


def worded(prompts: Sequence[str], seed: int) -> list[Pixels]:
    """By SD 1.5 from text with the word of the textual inversion."""
    files = {"word": folder("sd15-world-word") / "embedding.safetensors"}
    return drawn("sd15", prompts, seed, files, embeddings=[{"path": "word", "tokens": [TOKEN]}])


def like(prompts: Sequence[str], pictures: Sequence[Pixels], seed: int, scale: float) -> list[Pixels]:
    """By SD 1.5 and its IP-Adapter, from pictures in the place of words."""
    adapter = folder("sd15-world-ip-adapter")
    files = {"adapter": adapter / "ip_adapter.safetensors", "encoder": adapter / "image_encoder"}
    wish = {"path": "adapter", "ip_adapter_image_url": START, "scale": scale}
    return remade(
        "sd15",
        prompts,
        pictures,
        seed,
        files,
        ip_adapter=[wish],
        image_encoder_path="encoder",
        noise_strength=1,
    )


def sketched(prompts: Sequence[str], edges: Sequence[Pixels], seed: int, scale: float) -> list[Pixels]:
    """By SD 1.5 and its ControlNet, along edge maps."""
    net = {"path": "net", "image_url": START, "conditioning_scale": scale}
    files = {"net": folder("sd15-world-canny") / "diffusion_pytorch_model.safetensors"}
    return remade("sd15", prompts, edges, seed, files, controlnets=[net], noise_strength=1)


def along_edges(prompts: Sequence[str], pictures: Sequence[Pixels], seed: int, **fields: Any) -> list[Pixels]:
    """By SDXL along the pictures' edges; what they show else is forgotten."""
    known = {"image_url": START, "control_image_url": START, "strength": 1, "num_inference_steps": STEPS}
    wishes = [
        canny.Input.model_validate(known | fields | {"prompt": prompt, "seed": seed + number})
        for number, prompt in enumerate(prompts)
    ]
    pipeline = fast_sdxl_controlnet_canny_image_to_image.Pipeline(model("sdxl"))
    return draw(pipeline, wishes, *started(pictures))
