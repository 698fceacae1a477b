"""`fal-ai/fast-sdxl-controlnet-canny/image-to-image`: a picture remade along another's edges, with SDXL."""

from typing import Any, Final

from pydantic import BaseModel, Field

from schemas.fields import (
    AnySize,
    EndpointInput,
    Image,
    ImageSize,
    ImageUrl,
    InputPart,
    LoraPath,
    Prompt,
    Seed,
    check_size,
    check_work,
    resolve,
)
from schemas.settings import Limits

MAX_LORAS = 32


class LoraWeight(InputPart):
    """One LoRA and how strongly it acts: 0 is off, 1 as it was trained."""

    path: LoraPath
    scale: float = Field(1, ge=0, le=1)


class Input(EndpointInput):
    """What a caller sends."""

    prompt: Prompt = Field(description="The prompt to generate an image from.")
    control_image_url: ImageUrl = Field(description="The picture whose edges the result follows.")
    controlnet_conditioning_scale: float = Field(
        0.5, ge=0, le=1, description="How strictly the edges are followed; 0 is not at all."
    )
    image_url: ImageUrl = Field(description="The picture to start from.")
    negative_prompt: Prompt = Field("", description="What the picture should not show.")
    image_size: AnySize | None = Field(
        None,
        description="The size of the generated image. Absent: that of the control image, scaled down "
        "where it exceeds what this server makes.",
    )
    num_inference_steps: int = Field(25, ge=1, le=65, description="The steps of a whole denoising.")
    guidance_scale: float = Field(
        7.5, ge=0, le=20, description="How closely the model sticks to the prompt; up to 1 is not at all."
    )
    strength: float = Field(
        0.95, ge=0.01, le=1, description="1 remakes the picture entirely; towards 0 it is kept."
    )
    seed: Seed | None = Field(None, description="The same seed and input give the same image.")
    sync_mode: bool = Field(False, description="Return the pictures inside the answer, as data URIs.")
    num_images: int = Field(1, ge=1, le=8, description="The number of images to generate.")
    loras: list[LoraWeight] = Field([], max_length=MAX_LORAS, description="LoRAs, added together.")
    enable_safety_checker: bool = Field(False, description="Blacken pictures that are not safe.")
    expand_prompt: bool = Field(False, description="Let a language model write the prompt on.")

    def check(self, limits: Limits) -> None:
        if self.image_size is not None:
            size = resolve(self.image_size)
            check_size(size, limits)
            self.check_work(size, limits)

    def check_work(self, size: ImageSize, limits: Limits) -> None:
        check_work(size, self.num_images, self.num_inference_steps, limits)


class Output(BaseModel):
    """What a caller gets."""

    images: list[Image] = Field(description="The generated pictures.")
    timings: dict[str, float] = Field(
        description="Seconds that it waited, as `queue`; seconds spent, by stage, in all as `inference`; "
        "`steps_per_second`; and as `rows` how many pictures, of this request and others, shared a step in "
        "the mean."
    )
    seed: int = Field(description="The seed used: the one sent, or the one drawn.")
    has_nsfw_concepts: list[bool] = Field(description="Which pictures were found unsafe.")


EXAMPLE: Final[dict[str, Any]] = {
    "prompt": "Ice fortress, aurora skies, polar wildlife, twilight",
    "control_image_url": "https://storage.example.com/edges.png",
    "controlnet_conditioning_scale": 0.5,
    "image_url": "https://storage.example.com/tiger.jpeg",
    "negative_prompt": "cartoon, illustration, animation. face. male, female",
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "strength": 0.95,
    "num_images": 1,
    "loras": [],
}
