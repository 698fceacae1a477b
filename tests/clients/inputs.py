"""What the clients ask for. Small pictures, so that a story takes a fraction of a second."""

import io
from typing import Any

from PIL import Image

ENDPOINT = "fal-ai/flux/dev"
REMAKE = "fal-ai/flux-lora/image-to-image"
EDIT = "fal-ai/flux-general/rf-inversion"
APP = "fal-ai/flux"  # what request URLs are made of

ALICE = "alice:s3cret"
BOB = "bob:hunter2"

SIZE = {"width": 64, "height": 64}
SMALL: dict[str, Any] = {"prompt": "a lighthouse", "image_size": SIZE, "num_inference_steps": 3, "seed": 7}
WATCHED: dict[str, Any] = SMALL | {"image_size": "square", "num_inference_steps": 20}  # slow enough to see
LONG: dict[str, Any] = SMALL | {"image_size": "square_hd", "num_inference_steps": 50, "num_images": 4}

# The examples on fal's pages, without their pictures, and with fewer steps.
REMAKE_EXAMPLE: dict[str, Any] = {
    "prompt": "A photo of a lion sitting on a stone bench",
    "num_inference_steps": 28,
    "guidance_scale": 3.5,
    "num_images": 1,
    "enable_safety_checker": True,
    "output_format": "jpeg",
    "strength": 0.85,
} | {"num_inference_steps": 4}
EDIT_EXAMPLE: dict[str, Any] = {
    "prompt": "Wearing glasses",
    "num_inference_steps": 28,
    "controlnets": [],
    "controlnet_unions": [],
    "easycontrols": [],
    "guidance_scale": 3.5,
    "num_images": 1,
    "enable_safety_checker": True,
    "reference_strength": 0.65,
    "reference_end": 1,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "output_format": "png",
    "scheduler": "euler",
    "controller_guidance_forward": 0.6,
    "controller_guidance_reverse": 0.75,
    "reverse_guidance_end": 8,
    "reverse_guidance_schedule": "constant",
} | {"num_inference_steps": 4}


def steps(count: int) -> list[str]:
    """The log lines of a request of `count` steps."""
    return [f"step {step}/{count}" for step in range(1, count + 1)]


def drawing(size: tuple[int, int] = (80, 48)) -> Image.Image:
    """A picture to begin with."""
    return Image.linear_gradient("L").resize(size).convert("RGB")


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def picture(data: bytes) -> tuple[str | None, tuple[int, int]]:
    """What kind of picture the bytes are, and how large, once they have been read."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.format, image.size
