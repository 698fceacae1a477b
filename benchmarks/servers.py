"""Whole servers beside each other over HTTP: what a call costs that makes nothing, what a small picture
costs, and pictures a CPU second, with LoRAs and without.

Beside ours stand diffusers' own pipelines on the same weights, one torch thread: in FastAPI behind a lock; in
LitServe and in Ray Serve, which bring as many requests together as come at once and draw those that agree in
one call. Ray Serve has its Python proxy, or HAProxy as ours has. CPU time is that of all processes of a
server, also what it uses without any call.

All are asked in the same words; ours mostly in sync mode, in which its answer has the picture, as theirs do.
Pictures of all are compared before anything is timed.
"""

import json
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import count, repeat
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import torch
from diffusers import FluxPipeline
from numpy.typing import NDArray
from PIL import Image

from benchmarks import overhead
from benchmarks.adapters import NAMES, RANK, write_loras
from benchmarks.load import Tally, drive, request
from benchmarks.measure import Row, arguments, cpu_s, header, percentile, serving, show, timed
from benchmarks.peers import peer
from benchmarks.stock import Stock, read
from deployments.server import inner_ports
from pipelines import images, zoo
from tests.support.jobs import ENDPOINT
from tests.support.server import Server

REPEATS, SECONDS, WARM_UP_S, IDLE_S = 3, 2.0, 1.0, 5.0
FEW, MANY = 1, 8  # calls at once
SHAPES = ((128, 8), (256, 8), (128, 28))  # side in pixels, steps; 28 are what fal does unless it is told
ROUNDING, JPEG_APART = 1, 12  # of 255
REMAKE = "fal-ai/flux-lora/image-to-image"
OURS, HAPROXY = "darkroom", "Ray Serve, HAProxy"
NOOP_AIM_MS = 2.0  # CPU-ms of a call beyond one to Ray Serve with HAProxy
THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}  # as Ray's documentation says
WITH_HAPROXY = THROUGHPUT | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
CAPTION = f"median (range) of {REPEATS} interleaved repeats; idle CPU-ms: of it, used without any call"

Fields = dict[str, Any]
Wish = Callable[[int, int, int], Fields]  # of a number, a side in pixels, steps


def text(number: int, side: int, steps: int) -> Fields:
    return {
        "prompt": f"lighthouse {number}",
        "image_size": {"width": side, "height": side},
        "num_inference_steps": steps,
        "seed": number,
        "enable_safety_checker": False,
        "sync_mode": True,
    }


def remake(number: int, side: int, steps: int) -> Fields:
    """From a start picture of its own, with another LoRA than its neighbours."""
    start = Image.linear_gradient("L").rotate(number).resize((side, side)).convert("RGB")
    return text(number, side, steps + 1) | {
        "prompt": f"lighthouse {number}, remade",
        "image_url": f"data:image/jpeg;base64,{b64encode(images.encode(start, 'jpeg')).decode()}",
        "loras": [{"path": NAMES[number % len(NAMES)]}],
        "strength": (steps - 0.5) / (steps + 1),  # all steps but the first
    }


WORK: Mapping[str, Wish] = {"text": text, "start picture, a LoRA each": remake}


class Contender:
    """A server that answers /predict with a picture, and another call with next to nothing."""

    noop = ("POST", "/noop")

    def __init__(self, server: Server) -> None:
        self.server = server
        self.idle = 0.0  # CPU seconds a second without calls

    def cpu_s(self) -> float:
        return cpu_s(self.server.pids())

    def path(self, fields: Fields) -> str:
        return "/predict"

    def file(self, answer: Any) -> bytes:
        return b64decode(answer["image"])

    def draw(self, fields: Fields) -> bytes:
        """The picture's file."""
        answer = httpx.post(self.server.url + self.path(fields), json=fields, timeout=120)
        return self.file(answer.raise_for_status().json())

    def load(self, at_once: int, wishes: Iterator[Fields] | None, seconds: float) -> Tally:
        """Calls for the wishes, or for nothing."""

        def following(_: int) -> bytes:
            if wishes is None:
                return request(self.server.url, *self.noop)
            fields = next(wishes)
            return request(self.server.url, "POST", self.path(fields), json.dumps(fields).encode())

        return drive(self.server.url, at_once, seconds, following)


class Darkroom(Contender):
    """Its front answers polls of a finished request's status by itself, out of the store."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        path = f"/queue/{ENDPOINT.rpartition('/')[0]}/requests"
        done = httpx.post(f"{server.url}/run/{ENDPOINT}", json=overhead.REQUEST, timeout=120)
        self.noop = ("GET", f"{path}/{done.headers['x-fal-request-id']}/status")

    def path(self, fields: Fields) -> str:
        return f"/run/{REMAKE if 'image_url' in fields else ENDPOINT}"

    def file(self, answer: Any) -> bytes:
        return b64decode(answer["images"][0]["url"].partition(",")[2])


@contextmanager
def contenders(folder: Path, loras: Path, batch: int) -> Iterator[dict[str, Contender]]:
    """`batch`: how many pictures LitServe and Ray Serve may draw in one call."""
    weights = {
        "cache": f"file://{folder}/weights",
        "hub": False,
        "names": {name: str(loras / name) for name in NAMES},
    }
    with ExitStack() as stack:

        def ray(mode: dict[str, str]) -> Contender:
            ports = mode | inner_ports()
            return Contender(
                stack.enter_context(peer("benchmarks.ray_stock", batch, loras, environment=ports))
            )

        yield {
            OURS: Darkroom(stack.enter_context(serving(folder, weights=weights))),
            "FastAPI, a lock": Contender(stack.enter_context(peer("benchmarks.fastapi_stock", loras))),
            "LitServe": Contender(
                stack.enter_context(peer("benchmarks.litserve_stock", batch, "flux", loras))
            ),
            "Ray Serve": ray(THROUGHPUT),
            HAPROXY: ray(WITH_HAPROXY),
        }


def check(stock: Stock, found: Mapping[str, Contender]) -> None:
    """Every server draws what diffusers' pipeline does in this process, many at once."""
    for wish in WORK.values():
        for side, steps in SHAPES:
            asked = [wish(number, side, steps) | {"output_format": "png"} for number in range(MANY)]
            answers = stock.answer([read(fields) for fields in asked])
            expected = [_pixels(b64decode(answer["image"])) for answer in answers]
            assert _apart(expected[0], expected[1]) > 2 * JPEG_APART, "two seeds draw the same"
            most = ROUNDING if wish is remake else JPEG_APART  # flux/dev knows no PNG
            for name, contender in found.items():
                with ThreadPoolExecutor(MANY) as callers:
                    drawn = [_pixels(file) for file in callers.map(contender.draw, asked)]
                apart = max(map(_apart, drawn, expected))
                assert apart <= most, f"{name}, {side} px, {steps} steps: pictures differ by {apart} of 255"


def _pixels(file: bytes) -> NDArray[Any]:
    return np.asarray(Image.open(BytesIO(file))).astype(int)


def _apart(one: NDArray[Any], other: NDArray[Any]) -> int:
    return int(np.abs(one - other).max())


def measure_idle(found: Mapping[str, Contender]) -> None:
    used = {name: contender.cpu_s() for name, contender in found.items()}
    time.sleep(IDLE_S)
    for name, contender in found.items():
        contender.idle = (contender.cpu_s() - used[name]) / IDLE_S


@dataclass(frozen=True, slots=True)
class Way:
    """What is measured: calls for so many seconds, and the CPU seconds used so far by what answers."""

    load: Callable[[float], Tally]
    cpu_s: Callable[[], float] = time.process_time
    idle: float = 0.0  # CPU seconds a second without calls


def over_http(contender: Contender, at_once: int, wishes: Iterator[Fields] | None = None) -> Way:
    return Way(partial(contender.load, at_once, wishes), contender.cpu_s, contender.idle)


def in_process(call: Callable[[], object]) -> Way:
    def load(seconds: float) -> Tally:
        tally, began = Tally(), time.perf_counter()
        while tally.seconds < seconds:
            tally.latencies.append(timed(call))
            tally.seconds = time.perf_counter() - began
        return tally

    return Way(load)


def measure(ways: Mapping[str, Way]) -> dict[str, dict[str, list[float]]]:
    """The columns of each way."""
    for way in ways.values():
        way.load(WARM_UP_S)
    found: dict[str, dict[str, list[float]]] = {
        name: {"CPU-ms": [], "idle CPU-ms": [], "p50 ms": [], "per s": []} for name in ways
    }
    for _ in range(REPEATS):
        for name, way in ways.items():
            used = way.cpu_s()
            tally = way.load(SECONDS)
            used, calls, columns = way.cpu_s() - used, len(tally.latencies), found[name]
            columns["CPU-ms"].append(1e3 * used / calls)
            columns["idle CPU-ms"].append(1e3 * way.idle * tally.seconds / calls)
            columns["p50 ms"].append(1e3 * percentile(tally.latencies, 50))
            columns["per s"].append(tally.per_s)
    return found


def noops(found: Mapping[str, Contender]) -> list[Row]:
    """Calls that the front answers by itself."""
    rows: list[Row] = []
    for at_once in (FEW, MANY):
        taken = measure({name: over_http(each, at_once) for name, each in found.items()})
        rows += [{"at once": float(at_once), "by": name, **columns} for name, columns in taken.items()]
    return rows


def small(stock: Stock, found: Mapping[str, Contender]) -> list[Row]:
    """One small picture at a time; over: what it costs more than the same pipeline in this process."""
    asked = overhead.REQUEST | {"sync_mode": True}
    ours, theirs = "our pipeline, in-process", "diffusers, in-process"
    ways = {
        ours: in_process(overhead.direct()),
        theirs: in_process(lambda: stock.answer([read(asked)])),
    }
    if OURS in found:
        ways[f"{OURS}, a stored file"] = over_http(found[OURS], FEW, repeat(overhead.REQUEST))
    ways |= {name: over_http(each, FEW, repeat(asked)) for name, each in found.items()}
    taken = measure(ways)
    rows: list[Row] = []
    for name, columns in taken.items():
        plain = taken[ours if name.startswith((ours, OURS)) else theirs]["CPU-ms"]
        over = [a - b for a, b in zip(columns["CPU-ms"], plain, strict=True)]
        rows.append({"by": name, **columns, "over CPU-ms": over})
    return rows


def pictures(found: Mapping[str, Contender], at_once: int) -> list[Row]:
    """Each request with its own text, seed and start picture; ratio: ours over this one."""
    rows: list[Row] = []
    for work, wish in WORK.items():
        for side, steps in SHAPES:
            wishes = {name: (wish(number, side, steps) for number in count()) for name in found}
            taken = measure({name: over_http(each, at_once, wishes[name]) for name, each in found.items()})
            ours = next(iter(taken.values()))["CPU-ms"]
            for name, columns in taken.items():
                rows.append(
                    {
                        "work": work,
                        "size": f"{side} px, {steps} steps",
                        "at once": float(at_once),
                        "by": name,
                        "per CPU-s": [1e3 / each for each in columns["CPU-ms"]],
                        "ratio": [a / b for a, b in zip(columns["CPU-ms"], ours, strict=True)],
                        **columns,
                    }
                )
    return rows


def noop_aim(rows: Sequence[Row]) -> str:
    cost = {(row["by"], row["at once"]): _median(row, "CPU-ms") for row in rows}
    over = {at_once: cost[OURS, at_once] - cost[HAPROXY, at_once] for at_once in (FEW, MANY)}
    told = ", ".join(f"{value:.2f} at {at_once} at once" for at_once, value in over.items())
    verdict = "met" if max(over.values()) <= NOOP_AIM_MS else "MISSED"
    return f"Aim, at most {NOOP_AIM_MS:g} CPU-ms over {HAPROXY}: {told}: {verdict}"


def pictures_aim(rows: Sequence[Row]) -> str:
    """Whether ours is ahead of all where requests have LoRAs of their own."""
    mixed = [row for row in rows if row["work"] != "text" and row["at once"] == MANY and row["by"] != OURS]
    behind = [f"{row['by']} at {row['size']}" for row in mixed if _median(row, "ratio") <= 1]
    verdict = f"MISSED, behind {', '.join(behind)}" if behind else "met"
    return f"Aim, ahead of all at {MANY} at once with different LoRAs: {verdict}"


def _median(row: Row, column: str) -> float:
    values = row[column]
    assert isinstance(values, list)
    return median(values)


def run(folder: Path, file: Path | None) -> None:
    loras = folder / "loras"
    write_loras(loras, FluxPipeline.from_pretrained(zoo.locate("flux")).transformer, NAMES)
    stock = Stock(loras)
    with contenders(folder, loras, FEW) as found:
        check(stock, found)
        measure_idle(found)
        rows = noops(found)
        about = "ours: a poll of a finished request's status, read from the store"
        show("servers: a call without work", rows, f"{CAPTION}; {about}. {noop_aim(rows)}", file)
        rows = small(stock, found)
        show("servers: a picture of 64 px, 2 steps, JPEG, one at a time", rows, CAPTION, file)
        rows = pictures(found, FEW)
    with contenders(folder, loras, MANY) as found:
        check(stock, found)
        measure_idle(found)
        rows += pictures(found, MANY)
    show(
        f"servers: pictures a CPU second, LoRAs of rank {RANK}",
        rows,
        f"{CAPTION}; ratio: ours over this one. Checked before: pictures of all differ by at most {ROUNDING} "
        f"of 255, those told as JPEG by at most {JPEG_APART}. {pictures_aim(rows)}",
        file,
    )


def main() -> None:
    options = arguments("Whole servers beside each other over HTTP.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options.dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.dir, prefix="servers-", ignore_cleanup_errors=True) as folder:
        run(Path(folder).resolve(), options.json)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    header()
    main()
