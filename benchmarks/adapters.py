"""LoRAs in our bank beside the same LoRAs in diffusers with peft: switching, stepping, mixed batches.

FLUX's depth, at a tiny width, so that the work per layer counts rather than the multiplications; switching
at FLUX.1-dev's width too. Files of rank 16 on every attention and feed-forward layer, one torch thread.
"""

import gc
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.measure import Row, arguments, header, show
from pipelines import zoo
from pipelines.adapters.bank import LoraUse
from pipelines.engine.sample import Sample
from pipelines.flux.model import FluxModel
from pipelines.flux.plan import Adapters, Conditioning, Denoising, FluxPlan
from pipelines.flux.sampling import Grid, draw_noise, image_ids
from schemas.settings import ModelSettings
from tests.support.jobs import ENDPOINT

REPEATS, RANK, WIDTH, TOLERANCE, WARM_MS = 5, 16, 32, 1e-4, 30
NAMES = [f"lora-{number}" for number in range(8)]
GRID, TEXT_TOKENS, SIGMAS, GUIDANCE = Grid(8, 8), 32, (0.6, 0.0), 3.5
CAPTION = (
    f"median (range) of {REPEATS} interleaved repeats; ratio: CPU time over ours; apart: largest difference "
    f"between outputs, at most {TOLERANCE}"
)


def tiny() -> Any:
    """A FluxPipeline whose transformer has the same weights every time."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2, "axes_dims_rope": (4, 6, 6)}
    widths = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
    transformer = FluxTransformer2DModel(guidance_embeds=True, **heads, **widths)
    return FluxPipeline.from_pretrained(zoo.locate("flux"), transformer=transformer.eval())


def wide() -> Any:
    """FLUX.1-dev's sizes in bfloat16; every weight is one zero seen many times, for none is multiplied."""
    zero = torch.zeros(1, dtype=torch.bfloat16)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    for module in transformer.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(zero.expand(weight.shape), requires_grad=False))
    return FluxPipeline.from_pretrained(zoo.locate("flux"), transformer=transformer.eval())


def write_loras(folder: Path, transformer: Any, names: Sequence[str]) -> None:
    folder.mkdir()
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=transformer.dtype)
    layers = {
        f"transformer.{path}": module
        for path, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in path and ".norm" not in path
    }
    for name in names:
        downs = {f"{key}.lora_A.weight": draw(RANK, layer.in_features) / 8 for key, layer in layers.items()}
        ups = {f"{key}.lora_B.weight": draw(layer.out_features, RANK) / 8 for key, layer in layers.items()}
        save_file(downs | ups, folder / name)


def conditioning(picture: int) -> Conditioning:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(picture))
    return Conditioning(draw(TEXT_TOKENS, WIDTH), draw(WIDTH))


class Ours:
    """`seats` LoRAs fit beside the model; without RAM for them, their files are read each time."""

    def __init__(self, pipeline: Any, folder: Path, seats: int, ram_bytes: int = 2**30) -> None:
        settings = ModelSettings(
            model="any", endpoints=(ENDPOINT,), lora_rank=seats * RANK, lora_ram_bytes=ram_bytes
        )
        self._model, self._folder = FluxModel(pipeline, settings), folder
        for file in sorted(folder.iterdir()):
            self.hold(file.name)

    def hold(self, name: str) -> None:
        """It stays beside the model until others need the room."""
        with self._model.holding({name: self._model.read_lora(self._folder / name)}):
            pass

    @torch.inference_mode()
    def step(self, *rows: Sequence[LoraUse], first: int = 0) -> Tensor:
        """One forward: picture `first` and those after it, each with its own LoRAs."""
        samples = []
        for picture, uses in enumerate(rows, first):
            leg = Denoising(conditioning(picture), SIGMAS, GUIDANCE, Adapters(tuple(uses)))
            samples.append(Sample(str(picture), FluxPlan(GRID, leg), draw_noise(GRID, picture)))
        return torch.stack(list(self._model.predict(samples)))

    def output(self, name: str) -> Tensor:
        return self.step([LoraUse(name)])

    def step_in_turn(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self.step([LoraUse(name)], first=picture) for picture, name in enumerate(names)])


class Theirs:
    """diffusers' pipeline with LoRAs; its transformer is called as it is, without anything of ours."""

    def __init__(self, pipeline: Any, folder: Path, names: Sequence[str] = ()) -> None:
        self.pipeline = pipeline
        for name in names:
            self.load(str(folder / name), name)

    def load(self, file: Any, name: str, hotswap: bool = False) -> None:
        self.pipeline.load_lora_weights(file, adapter_name=name, hotswap=hotswap)

    def choose(self, names: Sequence[str] | str, scales: Any = None) -> None:
        self.pipeline.enable_lora()
        self.pipeline.set_adapters(names, scales)

    @torch.inference_mode()
    def step(self, picture: int = 0) -> Tensor:
        """One forward with the adapters that are set."""
        text = conditioning(picture)
        found: Tensor = self.pipeline.transformer(
            hidden_states=draw_noise(GRID, picture)[None],
            timestep=torch.tensor(SIGMAS[:1]),
            guidance=torch.tensor([GUIDANCE]),
            pooled_projections=text.pooled[None],
            encoder_hidden_states=text.tokens[None],
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            img_ids=image_ids(GRID),
            return_dict=False,
        )[0]
        return found

    def output(self, name: str) -> Tensor:
        return self.step()

    def step_in_turn(self, names: Sequence[str]) -> Tensor:
        found = []
        for picture, name in enumerate(names):
            self.pipeline.set_adapters(name)
            found.append(self.step(picture))
        return torch.cat(found)


def nothing(name: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Way:
    """What is timed, each call with the next name. `output` and `before` are not."""

    call: Callable[[str], object]
    output: Callable[[str], Tensor]  # a forward after the call
    before: Callable[[str], object] = nothing
    names: Sequence[str] = ("",)


def forward(step: Callable[[], Tensor], before: Callable[[str], object] = nothing) -> Way:
    return Way(lambda name: step(), lambda name: step(), before)


def compare(label: Row, ways: Mapping[str, Way], calls: int, compared: bool = True) -> list[Row]:
    """A row for each way, the first is ours. The first round is a warm-up; in it, outputs are compared."""
    walks = {title: cycle(way.names) for title, way in ways.items()}
    cpu: dict[str, list[float]] = {title: [] for title in ways}
    wall: dict[str, list[float]] = {title: [] for title in ways}
    outputs: dict[str, Tensor] = {}
    apart = dict.fromkeys(ways, 0.0)
    for repeat in range(1 + REPEATS):
        for title, way in ways.items():
            gc.collect()  # else one way pays for what another left behind
            cpu_s = wall_s = 0.0
            for name in islice(walks[title], calls):
                way.before(name)
                cpu_s, wall_s = cpu_s - time.process_time(), wall_s - time.perf_counter()
                way.call(name)
                cpu_s, wall_s = cpu_s + time.process_time(), wall_s + time.perf_counter()
                if compared and not repeat:
                    output = way.output(name)
                    difference = float((output - outputs.setdefault(name, output)).abs().max())
                    assert difference <= TOLERANCE, f"{label}, {title}: outputs differ by {difference}"
                    apart[title] = max(apart[title], difference)
            if repeat:
                cpu[title].append(cpu_s * 1000 / calls)
                wall[title].append(wall_s * 1000 / calls)
    ours = next(iter(cpu.values()))
    ratios = {title: [a / b for a, b in zip(cpu[title], ours, strict=True)] for title in ways}
    return [
        {
            **label,
            "by": title,
            "CPU ms": cpu[title],
            "wall ms": wall[title],
            "ratio": ratios[title],
            "apart": f"{apart[title]:.1g}" if compared else "not compared",
        }
        for title in ways
    ]


def switching(make: Callable[[], Any], folder: Path, names: Sequence[str], compared: bool) -> list[Row]:
    """Until the next forward has another LoRA, by where that one is."""
    write_loras(folder, make().transformer, names)
    files = {name: str(folder / name) for name in names}
    tensors = {  # copies: what load_file gives is the file in the operating system's cache
        name: {key: tensor.clone() for key, tensor in load_file(file).items()} for name, file in files.items()
    }
    few = len(names) - 1  # seats: the next name in turn never has one
    cold, warm = Ours(make(), folder, few, ram_bytes=0), Ours(make(), folder, few)
    hot = Ours(make(), folder, len(names))
    empty, slot, pair = (Theirs(make(), folder, loaded) for loaded in ((), names[:1], names[:2]))

    def drop(name: str) -> None:
        """The file leaves the operating system's cache."""
        with open(files[name], "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def unload(name: str) -> None:
        empty.pipeline.unload_lora_weights()
        drop(name)

    def load(sources: Mapping[str, Any]) -> Way:
        return Way(lambda name: empty.load(sources[name], name), empty.output, unload, names)

    def swap(sources: Mapping[str, Any]) -> Way:
        return Way(lambda name: slot.load(sources[name], names[0], hotswap=True), slot.output, drop, names)

    disk, ram = Way(cold.hold, cold.output, drop, names), Way(warm.hold, warm.output, names=names)
    bank = Way(hot.hold, hot.output, names=names)
    choose = Way(pair.pipeline.set_adapters, pair.output, names=names[:2])
    places = {
        "on disk": {"ours": disk, "load_lora_weights": load(files), "hotswap": swap(files)},
        "in RAM": {"ours": ram, "load_lora_weights": load(tensors), "hotswap": swap(tensors)},
        "beside the model": {"ours": bank, "set_adapters, 2 loaded": choose},
    }
    return [
        row
        for place, ways in places.items()
        for row in compare({"the LoRA is": place}, ways, calls=3, compared=compared)
    ]


def aim(rows: Sequence[Row]) -> str:
    """Whether a switch from RAM is as quick as we want it."""
    [cpu] = [row["CPU ms"] for row in rows if (row["the LoRA is"], row["by"]) == ("in RAM", "ours")]
    assert isinstance(cpu, list)
    return f"Aim, ours in RAM: {WARM_MS} CPU ms, {'met' if median(cpu) <= WARM_MS else 'MISSED'}"


def stepping(bare: Theirs, ours: Ours, peft: Theirs, layers: Sequence[str]) -> list[Row]:
    """A forward of one picture; ours and peft have eight LoRAs beside the model."""
    apart = float((bare.step() - ours.step([LoraUse(NAMES[0])])).abs().max())
    assert apart > 1000 * TOLERANCE, "the LoRAs do next to nothing"
    scales = {layer: 0.5 + number / len(layers) for number, layer in enumerate(layers)}
    peft_scales = {layer.removeprefix("transformer."): scale for layer, scale in scales.items()}
    spread = [NAMES[0], NAMES[4], NAMES[7]]

    def our(*uses: LoraUse) -> Way:
        return forward(lambda: ours.step(uses))

    def their(names: Sequence[str], scales: Any = None) -> Way:
        return forward(peft.step, lambda _: peft.choose(names, scales))

    cases = {
        "none": {
            "ours": our(),
            "diffusers without peft": forward(bare.step),
            "peft, disabled": forward(peft.step, lambda _: peft.pipeline.disable_lora()),
        },
        "1": {"ours": our(LoraUse(NAMES[0])), "peft": their(NAMES[:1])},
        "1, a scale for each layer": {
            "ours": our(LoraUse(NAMES[0], layers=scales)),
            "peft": their(NAMES[:1], {"transformer": peft_scales}),
        },
        "3": {"ours": our(*map(LoraUse, NAMES[:3])), "peft": their(NAMES[:3])},
        "3, far apart in the bank": {"ours": our(*map(LoraUse, spread)), "peft": their(spread)},
    }
    return [row for title, ways in cases.items() for row in compare({"LoRAs": title}, ways, calls=6)]


def mixing(ours: Ours, peft: Theirs, names: Sequence[str]) -> list[Row]:
    """As many pictures as LoRAs, one each: the time of all."""
    ways = {
        "ours, one batch": forward(lambda: ours.step(*([LoraUse(name)] for name in names))),
        "ours, one at a time": forward(lambda: ours.step_in_turn(names)),
        "set_adapters, one at a time": forward(lambda: peft.step_in_turn(names)),
    }
    return compare({"rows": str(len(names))}, ways, calls=3)


def run(folder: Path, json: Path | None) -> None:
    tables = {
        f"width {WIDTH}": switching(tiny, folder / "tiny", NAMES, compared=True),
        "FLUX.1-dev's width": switching(wide, folder / "wide", NAMES[:5], compared=False),
    }
    for width, rows in tables.items():
        show(f"adapters: a switch to a LoRA of rank {RANK}, {width}", rows, f"{CAPTION}. {aim(rows)}", json)
    files = folder / "tiny"
    bare, peft = (Theirs(tiny(), files, loaded) for loaded in ((), NAMES))
    ours = Ours(tiny(), files, len(NAMES))
    # sorted: peft takes the first name that is a part of a layer's, and single_transformer_blocks must be it
    layers = sorted({key.partition(".lora_")[0] for key in load_file(files / NAMES[0])})
    rows = stepping(bare, ours, peft, layers)
    show(f"adapters: a forward of one row, {GRID.tokens} + {TEXT_TOKENS} tokens", rows, CAPTION, json)
    rows = [row for size in (2, 4, 8) for row in mixing(ours, peft, NAMES[:size])]
    show("adapters: rows with a LoRA of their own each", rows, CAPTION, json)


def main() -> None:
    options = arguments("LoRAs in our bank beside diffusers with peft.")
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "Already found a `peft_config`")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options.dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.dir, prefix="adapters-") as folder:
        run(Path(folder), options.json)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    header()
    main()
