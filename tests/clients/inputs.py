"""What the clients ask for. Small pictures, so that a story takes a fraction of a second."""

import io
from typing import Any

from PIL import Image, ImageDraw

ENDPOINT = "fal-ai/flux/dev"
REMAKE = "fal-ai/flux-lora/image-to-image"
EDIT = "fal-ai/flux-general/rf-inversion"
UNIVERSAL = "fal-ai/lora/image-to-image"
CANNY = "fal-ai/fast-sdxl-controlnet-canny/image-to-image"
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

# The example on fal's page, whole but for its pictures, and what of it the code beside it shows.
CANNY_EXAMPLE: dict[str, Any] = {
    "prompt": "Ice fortress, aurora skies, polar wildlife, twilight",
    "controlnet_conditioning_scale": 0.5,
    "negative_prompt": "cartoon, illustration, animation. face. male, female",
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "strength": 0.95,
    "num_images": 1,
    "loras": [],
}
CANNY_CODE = {"prompt": CANNY_EXAMPLE["prompt"]}
CANNY_STEPS = 23  # 0.95 of 25, rounded down
CANNY_OUTPUT = {"images", "timings", "seed", "has_nsfw_concepts"}
# Where those pictures lie on their hosts; the first has no suffix.
CANNY_PICTURES = {
    "control_image_url": "u/74778219",
    "image_url": "files/tiger/IExuP-WICqaIesLZAZPur.jpeg",
}

# The example on fal's page, whole.
UNIVERSAL_EXAMPLE: dict[str, Any] = {
    "model_name": "stabilityai/stable-diffusion-xl-base-1.0",
    "prompt": "Photo of a european medieval 40 year old queen, silver hair, highly detailed face, "
    "detailed eyes, head shot, intricate crown, age spots, wrinkles",
    "negative_prompt": "cartoon, painting, illustration, worst quality, low quality, normal quality",
    "prompt_weighting": True,
    "noise_strength": 0.5,
    "loras": [],
    "embeddings": [],
    "controlnets": [],
    "ip_adapter": [],
    "image_encoder_weight_name": "pytorch_model.bin",
    "num_inference_steps": 30,
    "guidance_scale": 7.5,
    "timesteps": {"method": "default", "array": []},
    "sigmas": {"method": "default", "array": []},
    "image_format": "jpeg",
    "num_images": 1,
    "tile_width": 4096,
    "tile_height": 4096,
    "tile_stride_width": 2048,
    "tile_stride_height": 2048,
}
UNIVERSAL_SIDE = 128  # of a picture without a start picture, where the server makes none larger


def steps(count: int) -> list[str]:
    """The lines that a request's log has of its steps."""
    return [f"step {step}/{count}" for step in range(1, count + 1)]


def log(count: int) -> list[str]:
    """All lines of a request of `count` steps."""
    return ["in float32, by sdpa attention", *steps(count)]


def drawing(size: tuple[int, int] = (80, 48)) -> Image.Image:
    """A picture to begin with."""
    return Image.linear_gradient("L").resize(size).convert("RGB")


def shapes(size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture with edges."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, size[0] // 2, size[1] - 8), fill="navy")
    return image


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def picture(data: bytes) -> tuple[str | None, tuple[int, int]]:
    """What kind of picture the bytes are, and how large, once they have been read."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.format, image.size
