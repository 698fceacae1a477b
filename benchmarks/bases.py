"""Switching from one Stable Diffusion base model to another: ours beside diffusers' from_pretrained.

Random weights of SD 1.5's real sizes in float16 (2.1 GB) on a local disk, already in the system's cache;
one torch thread. Ours checks every header and every number first, as the files may be a stranger's.
"""

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.measure import Row, arguments, header, show
from pipelines.sd import vocabulary
from pipelines.sd.loading import CONFIGS
from pipelines.sd.model import SdModel
from schemas.settings import ModelSettings
from tests.support.jobs import ENDPOINT

REPEATS, PAGE = 3, 2048  # float16 numbers
CAPTION = (
    f"median (range) of {REPEATS} interleaved repeats; ratio: CPU time over ours. A resident model is not "
    "loaded at all, and serves others while another is."
)


def main() -> None:
    options = arguments(__doc__ or "")
    options.dir.mkdir(parents=True, exist_ok=True)
    header()
    with TemporaryDirectory(dir=options.dir) as folder:
        show("Base-model switch", list(rows(Path(folder))), CAPTION, options.json)


def rows(folder: Path) -> Iterator[Row]:
    first = build(folder / "first")
    second = Path(shutil.copytree(first, folder / "second", copy_function=os.link))
    settings = ModelSettings(model=str(first), endpoints=(ENDPOINT,), dtype="float16")
    model = SdModel.load(settings, Path)
    ways: dict[str, Callable[[], object]] = {
        "ours, loaded": lambda: load(settings, second),
        "ours, resident": lambda: hold(model, first),
        "diffusers, from_pretrained": lambda: load_stock(second),
    }
    measured: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            wall, cpu = cost(way)
            measured[name][0].append(wall)
            measured[name][1].append(cpu)
    ours = sorted(measured["ours, loaded"][1])[REPEATS // 2]
    for name, (walls, cpus) in measured.items():
        yield {"way": name, "wall s": walls, "CPU s": cpus, "ratio": [cpu / ours for cpu in cpus]}


def build(folder: Path) -> Path:
    """A diffusers folder of SD 1.5's sizes, with random weights."""
    configs = CONFIGS["sd1"]
    StableDiffusionPipeline(
        vae=filled(lambda: AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae"))),
        text_encoder=filled(lambda: CLIPTextModel(CLIPTextConfig.from_pretrained(configs / "text_encoder"))),
        tokenizer=vocabulary.openai(configs / "tokenizer", 77),
        unet=filled(
            lambda: UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet"))
        ),
        scheduler=PNDMScheduler.from_pretrained(configs / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def filled(make: Callable[[], Any]) -> Any:
    """A module in float16 with random numbers, of one that is made without any."""
    with torch.device("meta"):
        module: nn.Module = make()
    tensors = {name: torch.randn(each.shape).half() / 50 for name, each in module.state_dict().items()}
    module.load_state_dict(tensors, assign=True)
    return module


def load(settings: ModelSettings, path: Path) -> None:
    """A server that has nothing yet."""
    model = SdModel.load(settings.model_copy(update={"model": str(path)}), Path)
    touch(model.base._parts.modules)


def load_stock(path: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(
        path, dtype=torch.float16, safety_checker=None, requires_safety_checker=False
    )
    touch((stock.unet, stock.vae, stock.text_encoder))


def touch(modules: Iterable[nn.Module]) -> None:
    """Read a number of each page of memory: diffusers maps a file, which is read when it is used."""
    for module in modules:
        for tensor in module.parameters():
            tensor.view(-1)[::PAGE].sum()


def hold(model: SdModel, path: Path) -> None:
    with ExitStack() as held:
        model.hold_base(path, held)


def cost(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the wall's clock and of the CPU."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
