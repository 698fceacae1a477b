"""`make demo`: a server on the embedded models, and a picture asked for with fal's own client.

Everything here but `Server` is what an app that uses fal does anyway; the three lines of `point_at`
are the whole difference.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fal_client
import fal_client.client as settings
import httpx
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipelines import zoo

DRAW = "fal-ai/flux/dev"
SEED = 2
DRAWN = {
    "prompt": "a red triangle in the center on a white background",
    "image_size": {"width": 128, "height": 128},  # what the embedded models are taught
    "seed": SEED,
}
# Endpoints that begin with the picture drawn: what they are told, and the fields that it goes into.
REMAKE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "fal-ai/flux-lora/image-to-image": (
        {
            "prompt": "a blue triangle in the center on a white background",
            "strength": 0.95,
            "enable_safety_checker": False,  # the embedded one takes some outlines for what it flags
        },
        ["image_url"],
    ),
    "fal-ai/flux-general/rf-inversion": (
        # The picture pulls for 3 steps of 28: with the default, 8, it does not let its colour go.
        {"prompt": "a green triangle in the center on a white background", "reverse_guidance_end": 3},
        ["image_url"],
    ),
    "fal-ai/fast-sdxl-controlnet-canny/image-to-image": (
        {"prompt": "a yellow triangle in the center on a black background", "strength": 1},
        ["image_url", "control_image_url"],
    ),
    "fal-ai/lora/image-to-image": (
        {
            "model_name": "sd15",
            "prompt": "a (purple:1.2) square in the center on a pink background",
            "prompt_weighting": True,
            "scheduler": "DPM++ 2M Karras",
            "noise_strength": 0.9,
        },
        ["image_url"],
    ),
}
STYLE = "flux-world-outline"  # a LoRA that is uploaded, for the first of them
OUT = Path("out")

console = Console()


def point_at(server: str) -> None:
    """Make fal's unmodified Python client talk to `server`."""
    settings.RUN_URL_FORMAT, settings.QUEUE_URL_FORMAT = f"{server}/run/", f"{server}/queue/"
    settings.REST_URL, settings.CDN_URL = f"{server}/rest", f"{server}/cdn"
    settings.REALTIME_URL_FORMAT = f"{server}/run/".replace("http", "ws", 1)


def main() -> None:
    stay = os.environ.get("EXIT") != "1"
    os.environ.setdefault("FAL_KEY", "demo:demo")  # the client insists on one; the server does not
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}  # we show progress ourselves
    with console.status("embedded models") as status:
        for name in zoo.names():
            zoo.locate(name, report=status.update)
    with serving() as url:
        point_at(url)
        drawn = make_picture(DRAW, DRAWN)
        start = drawn["images"][0]["url"]
        style = fal_client.upload_file(zoo.locate(STYLE) / f"{STYLE}.safetensors")
        REMAKE["fal-ai/flux-lora/image-to-image"][0]["loras"] = [{"path": style}]
        remade = [
            make_picture(endpoint, {"seed": SEED, **told, **dict.fromkeys(fields, start)})
            for endpoint, (told, fields) in REMAKE.items()
        ]
        console.print(table([each["row"] for each in (drawn, *remade)]))
        sheet = contact_sheet([each["row"] for each in (drawn, *remade)])
        console.print(f"contact sheet {sheet.resolve().as_uri()}", highlight=False, soft_wrap=True)
        console.print(addresses(url), highlight=False, soft_wrap=True)
        if stay:
            console.print("Ctrl-C stops the server.")
            signal.sigwait({signal.SIGINT, signal.SIGTERM})


@contextmanager
def serving() -> Iterator[str]:
    """`darkroom serve` beside us, until the block ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    command = [sys.executable, "-m", "deployments.cli", "serve", *sys.argv[1:]]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is ours to pass on
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, ()),
    )
    try:
        yield wait_until_ready(process)
    finally:
        console.print("stopping the server")
        process.send_signal(signal.SIGINT)
        process.wait()


def wait_until_ready(process: "subprocess.Popen[str]") -> str:
    """Show what the server says until it is ready; returns its URL."""
    assert process.stdout is not None
    with console.status("starting the server") as status:
        for line in process.stdout:
            if ready := re.fullmatch(r"ready on (\S+)\n", line):
                return ready[1]
            status.update(f"starting the server: {line.strip()}")
    raise SystemExit("the server did not start; what it said stands above")


def make_picture(endpoint: str, request: dict[str, Any]) -> dict[str, Any]:
    """Submit, follow, fetch: the queue position, then step k of n. The output, with a row to show."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    submitted = time.monotonic()
    started = submitted
    took = 0.0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"{endpoint}: submitting", total=None)

        def show(update: fal_client.Status) -> None:
            nonlocal started, took
            if isinstance(update, fal_client.Completed):
                took = update.metrics["inference_time"]
            if isinstance(update, fal_client.Queued):
                started = time.monotonic()
                progress.update(bar, description=f"{endpoint}: {update.position} ahead in the queue")
            elif steps := [each["message"] for each in update.logs or [] if "step" in each["message"]]:
                done, total = map(int, steps[-1].removeprefix("step ").split("/"))
                progress.update(bar, description=f"{endpoint}: {steps[-1]}", completed=done, total=total)

        handle = fal_client.submit(endpoint, arguments=request)
        for update in handle.iter_events(with_logs=True):
            show(update)
        output = handle.get()
    picture = output["images"][0]
    row = {
        "endpoint": endpoint,
        "prompt": request["prompt"],
        "request id": handle.request_id,
        "s queued": f"{started - submitted:.2f}",
        "s inference": f"{took:.2f}",
        "file": str(save(picture["url"], endpoint)),
    }
    return {**output, "row": row}


def save(url: str, endpoint: str) -> Path:
    path = OUT / f"{endpoint.replace('/', '-')}{Path(urlsplit(url).path).suffix}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(httpx.get(url).raise_for_status().content)
    return path


def contact_sheet(rows: list[dict[str, Any]]) -> Path:
    """Every picture beside what it was made from, with its endpoint and prompt: out/demo.png."""
    side, text = 192, 24
    sheet = Image.new("RGB", (2 * side + 36, len(rows) * (side + 2 * text) + 12), "white")
    pen = ImageDraw.Draw(sheet)
    first = Path(rows[0]["file"])
    for number, row in enumerate(rows):
        top = 12 + number * (side + 2 * text)
        pen.text((12, top), f"{row['endpoint']}\n{row['prompt']}", fill="black")
        for column, path in enumerate([Path(row["file"])] if number == 0 else [first, Path(row["file"])]):
            with Image.open(path) as picture:
                shown = picture.convert("RGB").resize((side, side))
            sheet.paste(shown, (12 + (column or number == 0) * (side + 12), top + 2 * text - 12))
    file = OUT / "demo.png"
    sheet.save(file)
    return file


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table()
    for name in rows[0]:
        shown.add_column(name, overflow="fold")
    for row in rows:
        shown.add_row(*map(str, row.values()))
    return shown


def addresses(url: str) -> str:
    return (
        f"server        {url}\n"
        f"playground    {url}/playground\n"
        f"run, queue    {url}/run, {url}/queue\n"
        f"JavaScript    fal.config({{ proxyUrl: {{ url: '{url}/api/fal/proxy', when: 'always' }} }})"
    )


if __name__ == "__main__":
    main()
