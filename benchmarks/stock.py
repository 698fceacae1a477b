"""diffusers' own FLUX pipelines, beside which ours is measured. Of ours are the weights and the pictures'
coding."""

from base64 import b64decode, b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from diffusers.utils import logging
from PIL import Image
from PIL.Image import Image as Picture

from pipelines import images, zoo
from schemas.endpoints import flux_dev, flux_lora_image_to_image
from schemas.fields import resolve

TEXT_TOKENS = 32  # of a prompt; the tests' servers read as many

Text = flux_dev.Input
Remake = flux_lora_image_to_image.Input
Request = Text | Remake


def read(fields: dict[str, Any]) -> Request:
    """Those with a start picture, a data URI, name one LoRA."""
    return (Remake if "image_url" in fields else Text).model_validate(fields)


class Stock:
    """Texts to pictures, and start pictures with the LoRAs of a folder, loaded once, to pictures.

    diffusers draws a start picture's latents from the VAE's posterior, ours takes its mode; here both do.
    For one caller at a time.
    """

    def __init__(self, loras: Path | None = None) -> None:
        logging.set_verbosity_error()
        folder = zoo.locate("flux")
        self._text: Any = FluxPipeline.from_pretrained(folder)
        self._remake: Any = FluxImg2ImgPipeline.from_pretrained(folder)
        for pipeline in (self._text, self._remake):
            pipeline.set_progress_bar_config(disable=True)
        encode = self._remake.vae.encode
        self._remake.vae.encode = lambda pixels: SimpleNamespace(latents=encode(pixels).latent_dist.mode())
        for file in sorted(loras.iterdir()) if loras else ():
            self._remake.load_lora_weights(str(file), adapter_name=file.name)

    def answer(self, requests: Sequence[Request]) -> list[dict[str, str]]:
        """Each one's file, in base64."""
        drawn = zip(self.draw(requests), requests, strict=True)
        files = [images.encode(picture, _format(request)) for picture, request in drawn]
        return [{"image": b64encode(file).decode()} for file in files]

    def draw(self, requests: Sequence[Request]) -> list[Picture]:
        """Those that differ in no more than text, seed and start picture share a call."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            key = request.model_dump_json(exclude={"prompt", "seed", "image_url"})
            groups.setdefault(key, []).append(place)
        drawn: dict[int, Picture] = {}
        for places in groups.values():
            drawn |= zip(places, self._call([requests[place] for place in places], "pil"), strict=True)
        return [drawn[place] for place in range(len(requests))]

    def latents(self, request: Request) -> torch.Tensor:
        found: torch.Tensor = self._call([request], "latent")[0]
        return found

    def _call(self, requests: Sequence[Request], output: str) -> Any:
        """One call for all of them."""
        first = requests[0]
        assert first.image_size is not None
        size = resolve(first.image_size)
        pipeline, given = self._text, {}
        if isinstance(first, Remake):
            pipeline = self._remake
            pipeline.set_adapters(first.loras[0].path, first.loras[0].scale)
            pictures = [_picture(each.image_url) for each in requests if isinstance(each, Remake)]
            given = {"image": pictures, "strength": first.strength}
        return pipeline(
            prompt=[each.prompt for each in requests],
            width=size.width,
            height=size.height,
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(each.seed or 0) for each in requests],
            max_sequence_length=TEXT_TOKENS,
            output_type=output,
            **given,
        ).images


def _format(request: Request) -> images.Format:
    return request.output_format if isinstance(request, Remake) else "jpeg"


def _picture(data_uri: str) -> Picture:
    return Image.open(BytesIO(b64decode(data_uri.partition(",")[2]))).convert("RGB")
