"""An app that calls fal through Hugging Face's client: nothing here knows of another server."""

import base64
import io
import json
import sys
from typing import Any

from huggingface_hub import InferenceClient
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference._providers._common import HARDCODED_MODEL_INFERENCE_MAPPING

TASKS = {"text-to-image": "fal-ai/flux/dev", "image-to-image": "fal-ai/flux-lora/image-to-image"}
for task, endpoint in TASKS.items():  # what the Hub would answer
    mapping = InferenceProviderMapping(  # type: ignore[no-untyped-call]
        provider="fal-ai", hf_model_id=f"someone/{task}", providerId=endpoint, status="live", task=task
    )
    HARDCODED_MODEL_INFERENCE_MAPPING["fal-ai"][f"someone/{task}"] = mapping

small: dict[str, Any] = {"num_inference_steps": 3, "seed": 7}
client = InferenceClient(provider="fal-ai")
drawn = client.text_to_image("a lighthouse", model="someone/text-to-image", width=96, height=64, **small)
remade = client.image_to_image(sys.argv[1], prompt="a lion", model="someone/image-to-image", **small)


def told(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


print(json.dumps({"drawn": told(drawn), "remade": told(remade)}))
