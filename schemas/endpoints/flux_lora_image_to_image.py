"""`fal-ai/flux-lora/image-to-image`: a picture remade with FLUX.1 [dev] and any number of LoRAs."""

from typing import Any, Final, Literal

from pydantic import Field

from schemas.endpoints import flux_dev
from schemas.fields import (
    AnySize,
    EndpointInput,
    ImageSize,
    ImageUrl,
    LoraWeight,
    Prompt,
    Seed,
    check_size,
    check_work,
    resolve,
)
from schemas.settings import Limits

MAX_LORAS = 32


class Input(EndpointInput):
    """What a caller sends."""

    prompt: Prompt = Field(description="The prompt to generate an image from.")
    image_size: AnySize | None = Field(
        None,
        description="The size of the generated image. Absent: that of the start image, scaled down "
        "where it exceeds what this server makes.",
    )
    num_inference_steps: int = Field(28, ge=1, le=50, description="The steps of a whole denoising.")
    seed: Seed | None = Field(None, description="The same seed and input give the same image.")
    loras: list[LoraWeight] = Field([], max_length=MAX_LORAS, description="LoRAs, added together.")
    guidance_scale: float = Field(3.5, ge=0, le=35, description="How closely the model sticks to the prompt.")
    sync_mode: bool = Field(False, description="Return the pictures inside the answer, as data URIs.")
    num_images: int = Field(1, ge=1, le=4, description="The number of images to generate.")
    enable_safety_checker: bool = Field(True, description="Blacken pictures that are not safe.")
    output_format: Literal["jpeg", "png"] = Field("jpeg", description="The format of the pictures.")
    image_url: ImageUrl = Field(description="The picture to start from.")
    strength: float = Field(
        0.85, ge=0.01, le=1, description="1 remakes the picture entirely; towards 0 it is kept."
    )

    def check(self, limits: Limits) -> None:
        if self.image_size is not None:
            size = resolve(self.image_size)
            check_size(size, limits)
            self.check_work(size, limits)

    def check_work(self, size: ImageSize, limits: Limits) -> None:
        check_work(size, self.num_images, self.num_inference_steps, limits)


class Output(flux_dev.Output):
    """What a caller gets: as from flux/dev."""


EXAMPLE: Final[dict[str, Any]] = {
    "prompt": "A cat in a red scarf, oil on canvas",
    "image_url": "https://storage.example.com/cat.png",
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
    "strength": 0.85,
    "num_images": 1,
    "enable_safety_checker": True,
    "output_format": "jpeg",
}
