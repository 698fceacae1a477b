"""`fal-ai/flux/dev`: text to image with FLUX.1 [dev]."""

from typing import Any, Final

from pydantic import BaseModel, Field

from schemas.fields import (
    AnySize,
    EndpointInput,
    Image,
    ImageSize,
    ImageSizePreset,
    Prompt,
    Seed,
    check_size,
    check_work,
    resolve,
)
from schemas.settings import Limits


class Input(EndpointInput):
    """What a caller sends."""

    prompt: Prompt = Field(description="The prompt to generate an image from.")
    image_size: AnySize = Field(ImageSizePreset.landscape_4_3, description="The size of the generated image.")
    num_inference_steps: int = Field(28, ge=1, le=50, description="The number of inference steps to perform.")
    seed: Seed | None = Field(
        None,
        description="The same seed and the same prompt given to the same version of the model "
        "output the same image every time.",
    )
    guidance_scale: float = Field(3.5, ge=1, le=20, description="How closely the model sticks to the prompt.")
    sync_mode: bool = Field(False, description="Return the pictures inside the answer, as data URIs.")
    num_images: int = Field(1, ge=1, le=4, description="The number of images to generate.")
    enable_safety_checker: bool = Field(True, description="Blacken pictures that are not safe.")

    def check(self, limits: Limits) -> None:
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
        "the mean. Where the server trades exactness for speed, also `steps_skipped`, how many steps of a "
        "picture reused most of an earlier one in the mean, and `float8_layers`."
    )
    seed: int = Field(description="The seed used: the one sent, or the one drawn.")
    has_nsfw_concepts: list[bool] = Field(description="Which pictures were found unsafe.")
    prompt: str = Field(description="The prompt used.")


EXAMPLE: Final[dict[str, Any]] = {
    "prompt": "A red lighthouse on a cliff at dawn, long exposure, film grain",
    "image_size": "landscape_4_3",
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
    "num_images": 1,
    "enable_safety_checker": True,
}
