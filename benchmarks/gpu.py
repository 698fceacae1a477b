"""FLUX.1-dev, SDXL with a ControlNet and Stable Diffusion 1.5 at full size on one GPU, by random weights.

    python -m benchmarks.gpu [--part flux|sdxl|sd15] [--tiny] [--json FILE]

The models are built on the device by their public configurations, and nothing is downloaded; no weight is
zero, for zeros multiply faster. What is compared runs on the same weights in one run: diffusers' own module
as it is, the same compiled as diffusers' documentation says, and ours, which is warmed as a worker warms it.
`share` is of the card's matrix product of 8192³, measured in the same run. With random weights a threshold
would never skip, or always, so acceleration is timed by a forced pattern, 11 steps of 28.

`--tiny` does the same with tiny models, uncompiled, on a CPU too: for tests, its figures say nothing.
"""

import argparse
import gc
import json
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import console, show, timed
from pipelines.adapters.bank import LoraUse
from pipelines.adapters.lora import Lora, LoraLayer
from pipelines.encodings import Encodings
from pipelines.engine.sample import Sample
from pipelines.flux.model import FluxModel
from pipelines.flux.plan import Adapters, Conditioning, Denoising, FluxPlan, Row
from pipelines.flux.sampling import Grid, draw_noise, image_ids, schedule
from pipelines.sd.base import Base
from pipelines.sd.controlnet import ControlUse
from pipelines.sd.grid import Grid as Cells
from pipelines.sd.loading import CONFIGS
from pipelines.sd.parts import Kind, Parts
from pipelines.sd.plan import Prompting, SdPlan, Side
from pipelines.sd.schedule import Schedule
from pipelines.sd.text import Encoding
from pipelines.speed import artefacts, attention
from pipelines.speed.clock import seconds, wait
from pipelines.timed import Timed
from schemas.settings import ModelSettings, PictureSize, SpeedSettings

FLUX_STEPS, SD_STEPS, SKIPPED = 28, 30, 11
STD = 0.02  # of the weights
FLUX_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.1159,
    "scaling_factor": 0.3611,
}
FLUX = {"guidance_embeds": True}  # FluxTransformer2DModel's defaults are FLUX.1-dev's
TINY_BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
TINY_FLUX = {
    **FLUX,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
TINY_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TINY_UNET = {
    **TINY_BLOCKS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}


@dataclass(frozen=True, slots=True)
class Setup:
    """Where and how large."""

    device: torch.device
    tiny: bool
    json: Path | None = None
    notes: list[str] = field(default_factory=list)  # what could not be measured, and why

    @property
    def sizes(self) -> tuple[int, ...]:
        return (64,) if self.tiny else (512, 1024)

    @property
    def rows(self) -> tuple[int, ...]:
        return (1, 2) if self.tiny else (1, 2, 4, 8)

    @property
    def ranks(self) -> tuple[int, ...]:
        return (4,) if self.tiny else (16, 64)

    @property
    def calls(self) -> int:
        return 1 if self.tiny else 8

    @property
    def text_length(self) -> int:
        return 8 if self.tiny else 512

    def dtype(self, real: torch.dtype) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else real

    def time(self, call: Callable[[], object]) -> float:
        """Seconds."""
        return seconds(call, self.device, self.calls)

    def speed(self, **options: Any) -> SpeedSettings:
        on = {} if self.tiny else {"compile": "regional", "graphs": "auto", "channels_last": True}
        return SpeedSettings.model_validate({**on, "attention": "auto", **options})

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What fails inside is noted, and the rest of the run goes on."""
        try:
            yield
        except Exception as error:
            if self.tiny:
                raise
            logging.getLogger(__name__).exception("%s failed", what)
            self.notes.append(f"{what} FAILED: {type(error).__name__}: {str(error)[:200]}")
        self.give_back()

    def give_back(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak_gb(self) -> float:
        """The most memory in use since the last time that this was asked."""
        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


Found = dict[str, Any]


class Table:
    """Rows as they are measured; each is printed at once, for a run may be cut short."""

    def __init__(self, setup: Setup, title: str, ceiling: float) -> None:
        self._setup = setup
        self._title = title
        self._ceiling = ceiling
        self._rows: list[Found] = []

    def add(
        self, what: str, px: int, rows: int, ms: float, flop: float = 0, aim: str = "", **more: str
    ) -> None:
        """`ms` and `flop` are of a step of all the rows."""
        share = f"{flop / ms * 1e3 / self._ceiling:.0%}" if flop else ""
        row: Found = {
            "what": what,
            "px": str(px),
            "rows": str(rows),
            "ms": ms,
            "ms/row": ms / rows,
            "share": share,
            "peak GB": self._setup.peak_gb(),
            "remark": more.get("remark", ""),
            "aim": aim,
        }
        console.print({key: value for key, value in row.items() if value != ""})
        self._rows.append(row)

    def show(self) -> None:
        caption = f"matrix product 8192³: {self._ceiling / 1e12:.1f} TFLOP/s. " + "; ".join(self._setup.notes)
        if self._rows:
            show(self._title, self._rows, caption, self._setup.json)


def verdict(value: float, aim: float, unit: str) -> str:
    return f"≤ {aim:g} {unit}: {'met' if value <= aim else 'MISSED'}"


# The models


def made(setup: Setup, make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A module on the device with random weights, none of them zero, and without ever being elsewhere."""
    with torch.device("meta"):
        module = make()
    module = nn.Module.to(module, dtype=dtype).to_empty(device=setup.device).eval().requires_grad_(False)
    generator = torch.Generator(setup.device).manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(std=STD, generator=generator)
            if weight.dim() == 1 and name.endswith("weight"):  # a norm's
                weight.add_(1)
    return module


def ceiling(setup: Setup, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of random matrices."""
    side = 128 if setup.tiny else 8192
    a, b = torch.randn(2, side, side, device=setup.device, dtype=dtype).unbind()
    return 2 * side**3 / seconds(lambda: a @ b, setup.device, 20)


def flop_of(call: Callable[[], object]) -> float:
    """Multiplications and additions of one call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def apart(ours: Tensor, theirs: Tensor) -> str:
    """The root mean square of the difference over that of what is compared with."""
    difference = (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean()
    return f"apart {difference.sqrt():.1e}"


def random_lora(setup: Setup, shapes: Mapping[str, Sequence[int]], rank: int, seed: int) -> Lora:
    """On all the layers of these shapes, in bfloat16, in pinned memory where there is a GPU."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.bfloat16)
    layers = {
        name: LoraLayer(draw(rank, *inner) / 64, draw(out, rank) / 64)
        for name, (out, *inner) in shapes.items()
    }
    lora = Lora(layers)
    return lora.pinned() if setup.device.type == "cuda" else lora


# FLUX


def flux_text(setup: Setup, transformer: Any) -> Conditioning:
    config = transformer.config
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    text = draw(setup.text_length, config.joint_attention_dim), draw(config.pooled_projection_dim)
    return Conditioning(*(each.to(setup.device, transformer.dtype) for each in text))


@dataclass(frozen=True, eq=False)
class Forced(Denoising):
    """A denoising whose steps in `skipped` reuse the ones before, however much they differ."""

    skipped: frozenset[int] = frozenset()

    def row(self, step: int) -> Row:
        return replace(super().row(step), reuse=float("inf") if step in self.skipped else 0.0)


def flux_sample(
    setup: Setup, text: Conditioning, px: int, seed: int = 0, uses: Sequence[LoraUse] = (), skipped: int = 0
) -> Sample:
    grid = Grid.of(px, px)
    sigmas = schedule(FLUX_STEPS, 1.15)
    leg = Denoising(text, sigmas, 3.5, Adapters(tuple(uses)))
    if skipped:
        chosen = frozenset(
            FLUX_STEPS - 2 * (1 + each) for each in range(skipped)
        )  # every second one, the last
        leg = Forced(text, sigmas, 3.5, Adapters(tuple(uses)), skipped=chosen)
    return Sample("any", FluxPlan(grid, leg), draw_noise(grid, seed).to(setup.device))


def flux_inputs(setup: Setup, transformer: Any, text: Conditioning, px: int) -> dict[str, Any]:
    """What diffusers' transformer is called with for the sample of seed 0."""
    grid, dtype = Grid.of(px, px), transformer.dtype
    return {
        "hidden_states": draw_noise(grid, 0)[None].to(setup.device, dtype),
        "timestep": torch.ones(1, device=setup.device).to(dtype),
        "guidance": torch.full([1], 3.5, device=setup.device),
        "pooled_projections": text.pooled[None],
        "encoder_hidden_states": text.tokens[None],
        "txt_ids": torch.zeros(len(text.tokens), 3, device=setup.device, dtype=dtype),
        "img_ids": image_ids(grid).to(setup.device, dtype),
        "return_dict": False,
    }


def flux_parts(setup: Setup) -> Any:
    dtype = setup.dtype(torch.bfloat16)
    transformer = made(setup, lambda: FluxTransformer2DModel(**(TINY_FLUX if setup.tiny else FLUX)), dtype)
    vae = made(setup, lambda: AutoencoderKL(**(FLUX_VAE | (TINY_VAE if setup.tiny else {}))), dtype)
    none = nn.Module()
    return SimpleNamespace(transformer=transformer, vae=vae, text_encoder=none, text_encoder_2=none)


def flux_model(
    setup: Setup, parts: Any, rank: int, sizes: Sequence[int], rows: Sequence[int], **speed: Any
) -> FluxModel:
    settings = ModelSettings(
        model="FLUX.1-dev",
        endpoints=("any",),
        device=str(setup.device),
        dtype=str(parts.transformer.dtype).removeprefix("torch."),
        lora_rank=rank,
        batch_tokens=2**20,
        max_sequence_length=setup.text_length,
        speed=setup.speed(
            sizes=[PictureSize(width=px, height=px) for px in sizes], rows=tuple(rows), **speed
        ),
    )
    model = FluxModel(parts, settings)
    took, captured = timed(model.warm), model._transformer.denoiser.captured
    numbers = model.precision or settings.dtype
    console.print(
        f"warm-up of {rank=}: {took:.0f} s; in {numbers}, by {model.attention}, {captured} forwards captured"
    )
    return model


def flux(setup: Setup) -> None:
    table = Table(setup, "gpu: FLUX.1-dev", ceiling(setup, setup.dtype(torch.bfloat16)))
    parts = flux_parts(setup)
    with torch.inference_mode():
        text = flux_text(setup, parts.transformer)
    flops: dict[int, float] = {}
    plain: dict[int, Tensor] = {}
    with setup.trying("FLUX in diffusers"):
        flux_stock(setup, table, parts.transformer, text, flops, plain)
    with setup.trying("FLUX, ours"):
        model = flux_model(setup, parts, 0, setup.sizes, setup.rows)
        flux_ours(setup, table, model, text, flops, plain)
        flux_pictures(setup, table, model, text)
    # the bank's branches stay in the layers of this transformer: what follows has one of its own
    del parts
    model = None  # type: ignore[assignment]
    setup.give_back()
    with setup.trying("FLUX with LoRAs"):
        flux_loras(setup, table, text, flops)
    with setup.trying("FLUX in fp8"):
        flux_fp8(setup, table, text, flops)
    table.show()


@torch.inference_mode()
def flux_stock(
    setup: Setup,
    table: Table,
    transformer: Any,
    text: Conditioning,
    flops: dict[int, float],
    plain: dict[int, Tensor],
) -> None:
    """diffusers' transformer as it is, and with compiled blocks."""
    for px in setup.sizes:
        inputs = flux_inputs(setup, transformer, text, px)
        flops[px] = flop_of(lambda given=inputs: transformer(**given))  # type: ignore[misc]
        plain[px] = transformer(**inputs)[0]
        ms = setup.time(lambda given=inputs: transformer(**given)) * 1e3  # type: ignore[misc]
        table.add("diffusers", px, 1, ms, flops[px])
    if setup.tiny:  # tracing alone takes a minute
        return
    with setup.trying("FLUX in diffusers, compiled"):
        transformer.compile_repeated_blocks(fullgraph=True)
        for px in setup.sizes:
            inputs = flux_inputs(setup, transformer, text, px)
            remark = apart(transformer(**inputs)[0], plain[px])
            ms = setup.time(lambda given=inputs: transformer(**given)) * 1e3  # type: ignore[misc]
            table.add("diffusers, compiled", px, 1, ms, flops[px], remark=remark)
    for module in transformer.modules():
        module._compiled_call_impl = None


@torch.inference_mode()
def flux_ours(
    setup: Setup,
    table: Table,
    model: FluxModel,
    text: Conditioning,
    flops: Mapping[int, float],
    plain: Mapping[int, Tensor],
    name: str = "ours",
) -> None:
    """Steps of one row and of several."""
    for px in setup.sizes:
        alone = 0.0
        for rows in setup.rows:
            samples = [flux_sample(setup, text, px, seed) for seed in range(rows)]
            remark = apart(model.predict(samples)[0], plain[px]) if px in plain else ""
            ms = setup.time(lambda given=samples: model.predict(given)) * 1e3  # type: ignore[misc]
            alone = alone or ms
            remark = f"{remark} gain {alone * rows / ms:.2f}×"
            table.add(name, px, rows, ms, flops.get(px, 0) * rows, remark=remark)


@torch.inference_mode()
def denoised(setup: Setup, model: FluxModel, sample: Sample) -> Tensor:
    """Through all steps, and decoded."""
    while not sample.is_done:
        [prediction] = model.predict([sample])
        sample.accept(sample.plan.advance(sample.step, sample.latents, prediction, sample.denoised))
    assert isinstance(sample.plan, FluxPlan)
    return model.decode(sample.latents, sample.plan.grid)


def flux_pictures(
    setup: Setup, table: Table, model: FluxModel, text: Conditioning, precision: str = "bf16"
) -> None:
    """Whole pictures of 28 steps with the VAE; text encoding comes on top, once a prompt."""
    px = setup.sizes[-1]
    aims = {"bf16": 3.4, "fp8": 2.2}
    for skipped in (0, SKIPPED):
        denoised(setup, model, flux_sample(setup, text, px, skipped=skipped))
        wait(setup.device)

        def draw(skipped: int = skipped) -> None:
            denoised(setup, model, flux_sample(setup, text, px, skipped=skipped))
            wait(setup.device)

        took = timed(draw)
        what = f"a picture, {precision}" + (
            f", {skipped} of {FLUX_STEPS} steps skipped by force" if skipped else ""
        )
        table.add(what, px, 1, took * 1e3, aim="" if skipped else verdict(took, aims[precision], "s"))


def flux_loras(setup: Setup, table: Table, text: Conditioning, flops: Mapping[int, float]) -> None:
    """What LoRAs on all the blocks' layers cost a step, and how long a switch to one in RAM takes."""
    px, count = setup.sizes[-1], 3
    model = flux_model(setup, flux_parts(setup), count * max(setup.ranks), [px], [1])
    shapes = {
        name: shape for name, shape in model.targets.items() if "blocks." in name and ".norm" not in name
    }
    for rank in setup.ranks:
        loras = {f"{rank}-{seed}": random_lora(setup, shapes, rank, seed) for seed in range(count)}
        with torch.inference_mode(), model.holding(loras):
            bare = setup.time(lambda: model.predict([flux_sample(setup, text, px)])) * 1e3
            for used in (1, count):
                uses = [LoraUse(name) for name in list(loras)[:used]]
                sample = flux_sample(setup, text, px, uses=uses)
                ms = setup.time(lambda given=sample: model.predict([given])) * 1e3  # type: ignore[misc]
                over = (ms / bare - 1) * 100
                aim = verdict(over, 4, "%")
                what = f"{used} LoRA of rank {rank}"
                table.add(what, px, 1, ms, flops.get(px, 0), aim, remark=f"{over:+.1f} %")
    switches(setup, table, model, shapes, text)


def switches(
    setup: Setup, table: Table, model: FluxModel, shapes: Mapping[str, Sequence[int]], text: Conditioning
) -> None:
    """Until a forward may use an adapter that was in pinned RAM."""
    rank, px = setup.ranks[0], setup.sizes[-1]
    seats = setup.ranks[-1] * 3 // rank
    loras = [(f"switch-{seed}", random_lora(setup, shapes, rank, seed % 2)) for seed in range(2 * seats)]

    def switch(name: str, lora: Lora) -> None:
        with model.holding({name: lora}):
            wait(setup.device)

    times = sorted(timed(partial(switch, name, lora)) for name, lora in loras[seats:] + loras[:seats])
    median = times[len(times) // 2] * 1e3
    megabytes = loras[0][1].nbytes / 2**20
    remark = f"{megabytes:.0f} MiB, worst {times[-1] * 1e3:.1f} ms"
    table.add(f"switch, rank {rank}", px, 1, median, aim=verdict(median, 15, "ms"), remark=remark)


def flux_fp8(setup: Setup, table: Table, text: Conditioning, flops: Mapping[int, float]) -> None:
    if setup.device.type == "cpu":  # emulated there; ModelSettings takes bfloat16 only
        return
    model = flux_model(setup, flux_parts(setup), 0, setup.sizes[-1:], setup.rows, quantisation="fp8")
    flux_ours(setup, table, model, text, flops, {}, "ours, fp8")
    flux_pictures(setup, table, model, text, "fp8")


# Stable Diffusion


def sd_config(kind: Kind, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS[kind] / part / "config.json").read_text())
    return config


def unet_config(setup: Setup, kind: Kind) -> dict[str, Any]:
    if not setup.tiny:
        return sd_config(kind, "unet")
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "transformer_layers_per_block": (1, 2),
    }
    ups = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return TINY_UNET | ups | (added if kind == "sdxl" else {})


def sd_parts(setup: Setup, kind: Kind) -> tuple[Parts, Any]:
    """A model, and a ControlNet for it."""
    dtype = setup.dtype(torch.float16)
    config = unet_config(setup, kind)
    unet = made(setup, lambda: UNet2DConditionModel.from_config(config), dtype)
    vae_config = sd_config(kind, "vae") | (TINY_VAE if setup.tiny else {})
    overflows = kind == "sdxl" and dtype == torch.float16
    vae_dtype = torch.float32 if overflows else dtype
    vae = made(setup, lambda: AutoencoderKL.from_config(vae_config), vae_dtype)
    net = made(setup, lambda: control_net(setup, config), dtype)
    scheduler: dict[str, Any] = json.loads(
        (CONFIGS[kind] / "scheduler" / "scheduler_config.json").read_text()
    )
    return Parts(kind, unet, vae, (), (nn.Module(), nn.Module()), scheduler), net


def control_net(setup: Setup, config: Mapping[str, Any]) -> Any:
    options = {"conditioning_embedding_out_channels": (4, 8, 8, 8)} if setup.tiny else {}
    return ControlNetModel.from_unet(
        UNet2DConditionModel.from_config(config), load_weights_from_unet=False, **options
    )


def sd_sample(setup: Setup, base: Base, net: Any, px: int, seed: int, guidance: float = 5.0) -> Sample:
    """With guidance, and with a ControlNet if there is one."""
    grid = Cells.of(px, px)
    config = base.unet_config
    draw = torch.Generator().manual_seed(seed)

    def text() -> Encoding:
        tokens = base.as_weights(torch.randn(77, config.cross_attention_dim, generator=draw))
        if config.addition_embed_type != "text_time":
            return Encoding(tokens, None)
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return Encoding(tokens, base.as_weights(torch.randn(width, generator=draw)))

    image = base.as_weights(torch.rand(3, grid.height, grid.width, generator=draw))
    controls = (Timed(ControlUse(net, image, 0.7)),) if net is not None else ()
    prompting = Prompting(Side(text(), controls), Side(text(), controls), guidance)
    made_schedule = Schedule.build(None, base.scheduler_config, SD_STEPS, seed=seed)
    noise = torch.randn(4, grid.rows, grid.columns, generator=draw)
    return Sample("any", SdPlan(base, grid, prompting, made_schedule), base.to_device(noise))


def sd(setup: Setup, kind: Kind, name: str, aim_s: float | None, *, controlled: bool) -> None:
    table = Table(setup, f"gpu: {name}", ceiling(setup, setup.dtype(torch.float16)))
    parts, net = sd_parts(setup, kind)
    px = setup.sizes[-1] if kind == "sdxl" else setup.sizes[0]
    settings = ModelSettings(
        model=name,
        endpoints=("any",),
        lora_rank=setup.ranks[0],
        batch_tokens=2**20,
        speed=setup.speed(sizes=[PictureSize(width=px, height=px)], rows=setup.rows),
    )
    flops: dict[str, float] = {}
    with setup.trying(f"{name} in diffusers"):
        sd_stock(setup, table, parts, px, flops)
    with setup.trying(f"{name}, ours"):
        base = Base(
            name, parts, Encodings(settings), settings.lora_rank, settings.batch_tokens, speed=settings.speed
        )
        artefacts.keep_in(settings.speed.cache, setup.device, name)
        shape = base.attention_shape(Cells.of(px, px))
        kernel = attention.put_fastest_first(shape, parts.unet.dtype, setup.device)
        if base.denoiser.is_compiled:
            rows = sorted({2 * each for each in setup.rows})
            took = sum(timed(partial(base.warm, Cells.of(px, px), each)) for each in rows)
            captured = base.denoiser.captured
            console.print(f"warm-up: {took:.0f} s, by {kernel} attention, {captured} forwards captured")
        for guide in (None, net) if controlled else (None,):
            sd_ours(setup, table, base, guide, px, flops.get("step", 0), aim_s if guide is None else None)
    table.show()


@torch.inference_mode()
def sd_stock(setup: Setup, table: Table, parts: Parts, px: int, flops: dict[str, float]) -> None:
    """diffusers' UNet as it is, and compiled; a step with guidance is two rows."""
    grid = Cells.of(px, px)
    config, unet = parts.unet.config, parts.unet
    draw = partial(torch.randn, generator=torch.Generator(setup.device).manual_seed(0), device=setup.device)
    draw = partial(draw, dtype=unet.dtype)
    added = None
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": draw(2, width), "time_ids": draw(2, 6) + 512}
    inputs: dict[str, Any] = {
        "sample": draw(2, 4, grid.rows, grid.columns),
        "timestep": torch.full([2], 500.0, device=setup.device),
        "encoder_hidden_states": draw(2, 77, config.cross_attention_dim),
        "added_cond_kwargs": added,
        "return_dict": False,
    }
    flops["step"] = flop_of(lambda: unet(**inputs))
    plain = unet(**inputs)[0]
    table.add(
        "diffusers, a step with guidance", px, 1, setup.time(lambda: unet(**inputs)) * 1e3, flops["step"]
    )
    if setup.tiny:  # tracing alone takes a minute
        return
    with setup.trying("the UNet in diffusers, compiled"):
        unet.to(memory_format=torch.channels_last)
        fast: Any = torch.compile(unet, fullgraph=True)
        remark = apart(fast(**inputs)[0], plain)
        ms = setup.time(lambda: fast(**inputs)) * 1e3
        table.add("diffusers, compiled", px, 1, ms, flops["step"], remark=remark)


@torch.inference_mode()
def sd_ours(
    setup: Setup, table: Table, base: Base, net: Any, px: int, flop: float, aim_s: float | None
) -> None:
    """Steps of one picture with guidance and of several, and a whole picture."""
    name, alone = ("ours" if net is None else "ours, ControlNet"), 0.0
    for rows in setup.rows:
        samples = [sd_sample(setup, base, net, px, seed) for seed in range(rows)]
        ms = setup.time(lambda given=samples: base.predict(given)) * 1e3  # type: ignore[misc]
        alone = alone or ms
        flop_here = flop * rows if net is None else 0
        table.add(name, px, rows, ms, flop_here, remark=f"gain {alone * rows / ms:.2f}×")

    def draw() -> None:
        sample = sd_sample(setup, base, net, px, 0)
        while not sample.is_done:
            [prediction] = base.predict([sample])
            sample.accept(sample.plan.advance(sample.step, sample.latents, prediction, sample.denoised))
        base.decode(sample.latents)
        wait(setup.device)

    draw()
    took = timed(draw)
    aim = verdict(took, aim_s, "s") if aim_s else ""
    table.add(f"{name}, a picture of {SD_STEPS} steps", px, 1, took * 1e3, aim=aim)


PARTS: Mapping[str, Callable[[Setup], None]] = {
    "flux": flux,
    "sdxl": lambda setup: sd(setup, "sdxl", "SDXL", 0.9, controlled=True),
    "sd15": lambda setup: sd(setup, "sd1", "Stable Diffusion 1.5", None, controlled=False),
}


def header(setup: Setup) -> None:
    device = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else platform.processor()
    console.print(f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}", highlight=False)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The models at full size on one GPU, by random weights.")
    parser.add_argument("--part", choices=PARTS, action="append", help="all of them without this option")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each row to FILE as a JSON line")
    options = parser.parse_args(given)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU; --tiny runs on a CPU")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for part in options.part or PARTS:
        setup = Setup(device, options.tiny, options.json)
        header(setup)
        PARTS[part](setup)
        setup.give_back()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main()
