"""A style of your own: a LoRA trained on twenty pictures, uploaded, and used in the next request.

    darkroom serve                                              # in another terminal
    darkroom exec -- python examples/train_lora.py [STEPS]      # a few minutes on a CPU

The style is stripes, on the embedded FLUX. Everything after the training is what an app that uses fal does.
"""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import fal_client
import httpx
import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from pipelines import zoo
from pipelines.zoo import world
from pipelines.zoo.training import flux, lora

PICTURES, STEPS = 20, 200
OUT = Path("out")
REQUEST = {
    "prompt": "a blue circle in the center on a white background",
    "image_size": {"width": 128, "height": 128},
    "strength": 1,
    "seed": 7,
}

console = Console()


def main() -> None:
    file = train(OUT / "stripes.safetensors", int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
    url = fal_client.upload_file(file)
    start = fal_client.upload_file(blank(OUT / "blank.png"))
    plain = draw("plain", start, [])
    console.print(plain)
    for name, scale in {"off": 0, "stripes": 1}.items():
        styled = draw(name, start, [{"path": url, "scale": scale}])
        console.print(f"{styled}: {difference(plain, styled):.0f} of 255 from the plain one", highlight=False)


def draw(name: str, start: str, loras: list[dict[str, Any]]) -> Path:
    """The same request under these LoRAs."""
    answer = fal_client.subscribe(
        "fal-ai/flux-lora/image-to-image", arguments={**REQUEST, "image_url": start, "loras": loras}
    )
    picture = OUT / f"lora-{name}.jpg"
    picture.write_bytes(httpx.get(answer["images"][0]["url"]).raise_for_status().content)
    return picture


def difference(one: Path, other: Path) -> float:
    """The mean over all pixels and colours, 0 … 255."""
    pixels = [np.asarray(Image.open(each).convert("RGB"), dtype=float) for each in (one, other)]
    return float(np.abs(pixels[0] - pixels[1]).mean())


def train(file: Path, steps: int) -> Path:
    """A LoRA of pictures with stripes, in a file."""
    torch.set_num_threads(1)
    pipe = FluxPipeline.from_pretrained(zoo.locate("flux-world"), dtype=torch.float32)
    encoders = flux.Encoders(pipe.text_encoder, pipe.text_encoder_2, "cpu")
    rng = np.random.default_rng(1)
    scenes = [world.scene(rng).styled("stripes") for _ in range(PICTURES)]
    pictures = np.stack([world.draw(scene) for scene in scenes])
    captions = [world.caption(scene, rng) for scene in scenes]
    lesson = cache(lambda: flux.lesson_of(pictures, captions, pipe.vae, encoders))
    file.parent.mkdir(exist_ok=True)
    with Progress(console=console) as progress:
        bar = progress.add_task("training the LoRA", total=steps)
        pairs = lora.train(
            file.stem,
            pipe.transformer,
            flux.lora_loss(pipe.transformer, lesson),
            steps,
            file.parent / "checkpoints",
            lambda name, done, total: progress.update(bar, completed=done),
            "cpu",
        )
    lora.save(pairs, "transformer", file)
    return file


def blank(file: Path) -> Path:
    """A start picture that says nothing: at strength 1 it is forgotten."""
    Image.new("RGB", (128, 128), "gray").save(file)
    return file


if __name__ == "__main__":
    main()
