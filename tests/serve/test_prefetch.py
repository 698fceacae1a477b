"""What waits behind a replica full of work has its weights fetched meanwhile."""

import asyncio

import httpx
import torch
from safetensors.torch import save

from tests.support.hub import serving
from tests.support.server import Server
from tests.support.watching import submit

LONG = {"prompt": "x", "num_inference_steps": 50, "image_size": {"width": 768, "height": 768}}
WINDOW = 10  # more than the replica runs at once


async def test_weights_come_while_every_place_is_taken(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        async with serving() as hub:
            hub.files["/style.safetensors"] = save({"a": torch.zeros(1)})
            before = [await asyncio.to_thread(submit, http, LONG) for _ in range(WINDOW)]
            named = LONG | {
                "image_url": "http://there/x",
                "loras": [{"path": f"{hub.url}/style.safetensors"}],
            }
            last = await asyncio.to_thread(submit, http, named, "fal-ai/flux-lora/image-to-image")
            async with asyncio.timeout(10):
                while not hub.statuses[200]:
                    await asyncio.sleep(0.05)
            states = [http.get(each["status_url"]).json()["status"] for each in (*before, last)]
            for each in (last, *before):
                http.put(each["cancel_url"])
            assert states == ["IN_PROGRESS"] * WINDOW + ["IN_QUEUE"]
            assert hub.asked == {"/style.safetensors": 1}
