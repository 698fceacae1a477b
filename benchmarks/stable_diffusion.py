"""Pictures a CPU second of our engine beside diffusers' own pipeline: behind a lock, and in LitServe.

The canny endpoint's work on the embedded SDXL and ControlNet: two pictures and two texts to one picture,
with guidance, without HTTP and compression on either side. Beside ours stands
StableDiffusionXLControlNetImg2ImgPipeline with the same weights, sizes, steps, seeds and one torch thread,
one call after the other, or as many pictures a call as LitServe's dynamic batching brings together. One call
has one number of steps and one guidance, so LitServe gets only requests that agree in them, as many at once
as its batch takes; ours gets both those and requests of which each has its own.

diffusers draws the start picture's latents from the VAE's posterior, ours takes its mode; here both do.
Latents and pictures of all are compared before anything is timed.
"""

import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetImg2ImgPipeline
from diffusers.utils import logging
from PIL import Image, ImageDraw
from PIL.Image import Image as Picture

from benchmarks.measure import Row, arguments, cpu_s, header, show
from benchmarks.ours import Ours
from benchmarks.peers import peer
from pipelines import zoo
from pipelines.engine.sample import Sample
from pipelines.preprocess import canny
from pipelines.sd.fast_sdxl_controlnet_canny_image_to_image import HIGH, LOW, Pipeline
from pipelines.sd.model import SdModel
from schemas.endpoints.fast_sdxl_controlnet_canny_image_to_image import Input
from schemas.fields import ImageSize
from schemas.settings import ModelSettings
from tests.support.assets import given

REPEATS, TOLERANCE = 3, 1e-3
PICTURES = {128: 32, 256: 8}  # side in pixels → pictures a measurement
AT_ONCE = {128: (1, 4, 8, 16), 256: (1, 8)}
STEPS, GUIDANCE = 8, 7.5
START, CONTROL = "http://pictures/start.png", "http://pictures/control.png"
SETTINGS = ModelSettings(model="zoo:sdxl", controlnet="zoo:sdxl-canny", endpoints=("any",))


def wish(side: int, seed: int, steps: int = STEPS, guidance: float = GUIDANCE) -> Input:
    return Input.model_validate(
        {
            "prompt": "a lighthouse",
            "negative_prompt": "blurry",
            "image_url": START,
            "control_image_url": CONTROL,
            "image_size": {"width": side, "height": side},
            "strength": 0.95,
            "num_inference_steps": steps + 1,  # of which it does without the first
            "guidance_scale": guidance,
            "seed": seed,
        }
    )


def equal(side: int, count: int) -> list[Input]:
    return [wish(side, seed) for seed in range(count)]


def mixed(side: int, count: int) -> list[Input]:
    """As many steps in all as equal ones have."""
    steps = [STEPS + more for more in (-2, 1, 2, -1)]
    return [wish(side, seed, steps[seed % 4], 3.0 + seed % 7) for seed in range(count)]


def side_of(request: Input) -> int:
    assert isinstance(request.image_size, ImageSize)
    return request.image_size.width


def pictures(side: int) -> dict[str, Picture]:
    """What the requests' URLs lead to, of the size asked for."""
    control = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(control).ellipse((side // 4, side // 4, side // 2, side - 8), fill="navy")
    return {START: Image.linear_gradient("L").resize((side, side)).convert("RGB"), CONTROL: control}


class Stock:
    """diffusers' pipeline, without anything of ours but the search for edges."""

    def __init__(self) -> None:
        logging.set_verbosity_error()
        net = ControlNetModel.from_pretrained(zoo.locate("sdxl-canny"))
        self._pipeline: Any = StableDiffusionXLControlNetImg2ImgPipeline.from_pretrained(
            zoo.locate("sdxl"), controlnet=net
        )
        self._pipeline.set_progress_bar_config(disable=True)
        encode = self._pipeline.vae.encode
        self._pipeline.vae.encode = lambda pixels: SimpleNamespace(latents=encode(pixels).latent_dist.mode())
        self._pictures = {side: pictures(side) for side in PICTURES}

    def draw(self, requests: Sequence[Input]) -> list[Picture]:
        """One call for all of them."""
        drawn: list[Picture] = self._call(requests, "pil")
        return drawn

    def latents(self, request: Input) -> torch.Tensor:
        found: torch.Tensor = self._call([request], "latent")[0]
        return found

    def _call(self, requests: Sequence[Input], output: str) -> Any:
        first, side = requests[0], side_of(requests[0])
        own = {"seed", "prompt", "negative_prompt"}
        assert len({each.model_dump_json(exclude=own) for each in requests}) == 1, "settings differ"
        given = self._pictures[side]
        return self._pipeline(
            prompt=[each.prompt for each in requests],
            negative_prompt=[each.negative_prompt for each in requests],
            image=[given[START] for _ in requests],
            control_image=[canny(given[CONTROL], LOW, HIGH) for _ in requests],
            controlnet_conditioning_scale=first.controlnet_conditioning_scale,
            width=side,
            height=side,
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            strength=first.strength,
            generator=[torch.Generator("cpu").manual_seed(each.seed or 0) for each in requests],
            output_type=output,
        ).images


class Canny:
    """Ours, on the canny endpoint and its pictures."""

    def __init__(self) -> None:
        model = SdModel.load(SETTINGS, lambda source: zoo.locate(source.removeprefix("zoo:")))
        self._ours = Ours(Pipeline(model), SETTINGS.batch_tokens)
        self._pictures = {side: pictures(side) for side in PICTURES}
        self.close = self._ours.close

    def sample(self, request: Input) -> Sample:
        return self._ours.sample(request, given(request, self._pictures[side_of(request)]))

    def draw(self, request: Input) -> Picture:
        return self._ours.draw(request, given(request, self._pictures[side_of(request)]))


class Locked:
    """One call after the other, whoever calls."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._lock = Lock()

    def draw(self, request: Input) -> Picture:
        with self._lock:
            return self._stock.draw([request])[0]


class LitServe:
    """A client of benchmarks.litserve_stock. Its CPU time is that of the process that holds the model."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._worker: int = self._ask(wish(min(PICTURES), 0))["worker"]

    def draw(self, request: Input) -> Picture:
        answer = self._ask(request)
        return Image.frombytes("RGB", tuple(answer["size"]), b64decode(answer["pixels"]))

    def cpu_s(self) -> float:
        return cpu_s([self._worker])

    def _ask(self, request: Input) -> dict[str, Any]:
        answer = self._http.post("/predict", json=request.model_dump(mode="json")).raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


@contextmanager
def litserve(batch: int) -> Iterator[LitServe]:
    """LitServe on the stock pipeline until the end of the block."""
    with (
        peer("benchmarks.litserve_stock", batch, "sdxl") as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        yield LitServe(http)


@dataclass(frozen=True, slots=True)
class Way:
    draw: Callable[[Input], Picture]
    cpu_s: Callable[[], float] = time.process_time


def check(
    ours: Canny, stock: Stock, ways: Mapping[str, Way], side: int, callers: ThreadPoolExecutor
) -> float:
    """The largest difference between latents of one seed; pictures of all may differ by one rounding."""
    requests = equal(side, max(AT_ONCE[side]))
    drawn = {
        name: np.stack([np.asarray(each).astype(int) for each in callers.map(way.draw, requests)])
        for name, way in ways.items()
    }
    for name, found in drawn.items():
        apart = np.abs(found - drawn["ours"]).max()
        assert apart <= 1, f"{side} px, {name}: pictures differ by {apart} of 255"
    alike = [wish(side, 7), *mixed(side, 2)]
    worst = max(float((ours.sample(each).latents - stock.latents(each)).abs().max()) for each in alike)
    assert worst <= TOLERANCE, f"{side} px: latents differ by {worst}"
    return worst


def rates(way: Way, requests: Sequence[Input], callers: ThreadPoolExecutor) -> tuple[float, float]:
    """Pictures a CPU second and a wall second."""
    wall, cpu = time.perf_counter(), way.cpu_s()
    list(callers.map(way.draw, requests))
    wall, cpu = time.perf_counter() - wall, way.cpu_s() - cpu
    return len(requests) / cpu, len(requests) / wall


def compare(
    label: Row, ways: Mapping[str, Way], requests: Sequence[Input], callers: ThreadPoolExecutor
) -> list[Row]:
    """A row for each way, the first is ours."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            found[name].append(rates(way, requests, callers))
    ours = [cpu for cpu, _ in next(iter(found.values()))]
    return [
        {
            **label,
            "by": name,
            "per CPU-s": [cpu for cpu, _ in rated],
            "ratio": [a / b for a, (b, _) in zip(ours, rated, strict=True)],
            "per s": [wall for _, wall in rated],
        }
        for name, rated in found.items()
    ]


def measure(ours: Canny, stock: Stock, at_once: int) -> tuple[list[Row], float]:
    """The rows of so many requests at once, and the largest difference seen before."""
    rows: list[Row] = []
    worst = 0.0
    with litserve(at_once) as served, ThreadPoolExecutor(at_once) as callers:
        apart = {"ours": Way(ours.draw), "behind a lock": Way(Locked(stock).draw)}
        together = apart | {"LitServe": Way(served.draw, served.cpu_s)}
        for side in (side for side, counts in AT_ONCE.items() if at_once in counts):
            worst = max(worst, check(ours, stock, together, side, callers))
            label: Row = {"size": f"{side} px", "at once": float(at_once)}
            count = PICTURES[side]
            rows += compare({**label, "settings": "equal"}, together, equal(side, count), callers)
            rows += compare({**label, "settings": "mixed"}, apart, mixed(side, count), callers)
    return rows, worst


def main() -> None:
    options = arguments("Stable Diffusion in our engine beside diffusers behind a lock and in LitServe.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, stock = Canny(), Stock()
    counts = sorted({count for counts in AT_ONCE.values() for count in counts})
    found = [measure(ours, stock, at_once) for at_once in counts]
    rows = sorted((row for rows, _ in found for row in rows), key=lambda row: str(row["size"]))
    ours.close()
    torch.set_num_threads(threads)
    worst = max(worst for _, worst in found)
    show(
        f"Stable Diffusion: pictures a CPU second, {STEPS} steps with guidance, one torch thread",
        rows,
        f"median (range) of {REPEATS} interleaved repeats; ratio: ours over this one. Beside ours: "
        "StableDiffusionXLControlNetImg2ImgPipeline; of LitServe only the process with the model is counted. "
        f"Checked before: latents of one seed differ by at most {worst:.1g}, pictures by at most 1 of 255",
        options.json,
    )


if __name__ == "__main__":
    header()
    main()
