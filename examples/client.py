"""fal's Python client on your own server: submit, follow, fetch; upload a picture, remake it.

    darkroom serve
    FAL_KEY=me:secret python examples/client.py [SERVER]

Leaves out/drawn.jpg and out/remade.jpg.
"""

import os
import sys
from pathlib import Path

import fal_client
import fal_client.client as settings
import httpx

OUT = Path("out")
SIZE = {"width": 128, "height": 128}


def main() -> None:
    point_at(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
    drawn = save(draw("a red triangle in the center on a white background"), "drawn.jpg")
    print(save(remake(drawn, "a blue triangle in the center on a white background"), "remade.jpg"))


def point_at(server: str) -> None:
    """The whole difference to an app that calls fal."""
    os.environ.setdefault("FAL_KEY", "any:thing")  # the client insists on one
    settings.RUN_URL_FORMAT, settings.QUEUE_URL_FORMAT = f"{server}/run/", f"{server}/queue/"
    settings.REST_URL, settings.CDN_URL = f"{server}/rest", f"{server}/cdn"


def draw(prompt: str) -> str:
    """A picture's address. Shows the queue position and the steps."""
    handle = fal_client.submit("fal-ai/flux/dev", arguments={"prompt": prompt, "image_size": SIZE, "seed": 2})
    for event in handle.iter_events(with_logs=True):
        if isinstance(event, fal_client.Queued):
            print(event.position, "ahead")
        elif event.logs:
            print(event.logs[-1]["message"])
    return str(handle.get()["images"][0]["url"])


def remake(picture: Path, prompt: str) -> str:
    arguments = {"prompt": prompt, "image_url": fal_client.upload_file(picture), "strength": 0.95, "seed": 2}
    made = fal_client.subscribe("fal-ai/flux-lora/image-to-image", arguments=arguments)
    return str(made["images"][0]["url"])


def save(url: str, name: str) -> Path:
    OUT.mkdir(exist_ok=True)
    path = OUT / name
    path.write_bytes(httpx.get(url).raise_for_status().content)
    return path


if __name__ == "__main__":
    main()
