"""What the clients ask for. Small pictures, so that a story takes a fraction of a second."""

from typing import Any

ENDPOINT = "fal-ai/flux/dev"
REMAKE = "fal-ai/flux-lora/image-to-image"
APP = "fal-ai/flux"  # what request URLs are made of

ALICE = "alice:s3cret"
BOB = "bob:hunter2"

SIZE = {"width": 64, "height": 64}
SMALL: dict[str, Any] = {"prompt": "a lighthouse", "image_size": SIZE, "num_inference_steps": 3, "seed": 7}
WATCHED: dict[str, Any] = SMALL | {"image_size": "square", "num_inference_steps": 20}  # slow enough to see
LONG: dict[str, Any] = SMALL | {"image_size": "square_hd", "num_inference_steps": 50, "num_images": 4}


def steps(count: int) -> list[str]:
    """The log lines of a request of `count` steps."""
    return [f"step {step}/{count}" for step in range(1, count + 1)]
