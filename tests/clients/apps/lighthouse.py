"""An app as a user of fal writes it: nothing here knows of another server."""

import json
import sys
from typing import Any

import fal_client

small, large = sys.argv[1:]
ENDPOINT = "fal-ai/flux/dev"
picture: dict[str, Any] = {"prompt": "a lighthouse", "num_inference_steps": 3, "seed": 7}
picture["image_size"] = {"width": 64, "height": 64}
lines: list[str] = []


def on_update(update: fal_client.Status) -> None:
    if isinstance(update, fal_client.InProgress | fal_client.Completed):
        lines[:] = [line["message"] for line in update.logs or []]


told: dict[str, Any] = {}
told["subscribed"] = fal_client.subscribe(ENDPOINT, picture, with_logs=True, on_queue_update=on_update)
told["lines"] = lines
told["ran"] = fal_client.run(ENDPOINT, picture)
told["streamed"] = list(fal_client.stream(ENDPOINT, picture))
told["small"] = fal_client.upload_file(small)
told["large"] = fal_client.upload_file(large)
start = {"image_url": told["small"], "prompt": "a lion", "num_inference_steps": 4}
told["remade"] = fal_client.subscribe("fal-ai/flux-lora/image-to-image", start)
print(json.dumps(told))
