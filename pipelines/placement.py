"""Whether a model fits into its share of a GPU: told before anything is loaded.

What it must have is its weights, its largest forward, and the decoding of its largest picture beside that:
the two overlap. What it may come to hold is what its caches and banks may: beside requests that name no
adapters they stay empty. Ray's fraction of a GPU is the share of its memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from pipelines.footprint import TOKEN_PX, Component, components, decode_bytes, decoder_dtype, forward_bytes
from schemas.errors import AssetError, NoRoom
from schemas.settings import BaseSettings, ModelSettings

GIB = 2**30
CLIP_TOKENS = 77
DENOISERS = ("transformer", "unet")  # whose blocks may be compiled
UNREADABLE = (AssetError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Part:
    """Something that takes memory: how much, or None and why that cannot be told."""

    name: str
    nbytes: int | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """What a model takes, and what it has."""

    model: str
    weights: tuple[Part, ...]
    peaks: tuple[Part, ...]  # of computations that overlap
    stores: tuple[Part, ...]  # banks and caches, when they are full
    share: float  # of a GPU; 0: none
    card_bytes: int | None  # of the GPU; None: not known

    @property
    def needed(self) -> int:
        """Bytes that it must have, as far as they can be told."""
        return _sum(self.weights) + _sum(self.peaks)

    @property
    def room(self) -> int | None:
        """Bytes of a GPU that it has; None where that is not known or there is none."""
        return (
            None if self.card_bytes is None or not self.share else int(self.card_bytes * min(1.0, self.share))
        )

    @property
    def verdict(self) -> str:
        if not self.share:
            return "on the CPU"
        if self.room is None:
            more = _gib(_sum(self.stores))
            return f"needs {_gib(self.needed)} on its {self.share:g} GPU, and at most {more} more"
        if (over := self.needed - self.room) > 0:
            return f"does not fit: {over} bytes ({_gib(over)}) too much for {self._what_it_has()}"
        if (over := self.needed + _sum(self.stores) - self.room) > 0:
            return (
                f"fits {self._what_it_has()}, but not with its stores full: "
                f"lower adapter_bytes, lora_rank or the caches by {_gib(over)}"
            )
        return f"fits {self._what_it_has()}"

    def check(self) -> None:
        """Raise NoRoom where it cannot run."""
        if self.room is not None and self.needed > self.room:
            raise NoRoom(
                f"{self.model} {self.verdict}. Raise num_gpus, or lower batch_tokens, limits.max_pixels or "
                "the precision."
            )

    def lines(self) -> Iterator[str]:
        """The report."""
        yield f"{self.model}: {self.verdict}"
        for title, parts in (("weights", self.weights), ("peaks", self.peaks), ("at most", self.stores)):
            for part in parts:
                size = "unknown" if part.nbytes is None else _gib(part.nbytes)
                yield f"  {title:8} {part.name:30} {size:>11}  {part.note}".rstrip()

    def _what_it_has(self) -> str:
        assert self.room is not None
        return f"{_gib(self.room)}, which is {min(1.0, self.share):g} of the GPU"


def placed(
    settings: ModelSettings, locate: Callable[[str], Path | str], card_bytes: int | None = None
) -> Placement:
    """What a model will take, told by its files, and by its configs where the files are not here."""
    dtype: torch.dtype = getattr(torch, settings.dtype)
    found = _local(settings.model, locate)
    return Placement(
        settings.model,
        (*_weights(settings, dtype, locate), *_stage(settings, dtype, found)),
        tuple(_peaks(settings, dtype, found, locate)),
        tuple(_stores(settings, dtype, found)),
        settings.num_gpus if settings.device.startswith("cuda") else 0,
        card_bytes,
    )


def _weights(
    settings: ModelSettings, dtype: torch.dtype, locate: Callable[[str], Path | str]
) -> Iterator[Part]:
    yield from _parts("model", settings.model, locate, dtype)
    yield from _parts("controlnet", settings.controlnet, locate, dtype)
    yield from _parts("redux", settings.redux, locate, dtype, ("image_embedder", "image_encoder"))
    yield from _parts("depth", settings.depth, locate, torch.float32)
    yield from _parts("expander", settings.expander, locate, torch.float32)
    yield from _parts("safety_checker", settings.safety_checker, locate, torch.float32, ("safety_checker",))


def _parts(
    setting: str,
    source: str | None,
    locate: Callable[[str], Path | str],
    dtype: torch.dtype,
    names: tuple[str, ...] = (),
) -> Iterator[Part]:
    """The weights that a setting names."""
    if source is None:
        return
    folder = _local(source, locate)
    if folder is None:
        yield Part(setting, None, f"{source} is not on this machine; `hf download {source}` fetches it")
        return
    for each in components(folder, names) if names else components(folder):
        name = setting if each.path == folder else f"{setting}/{each.name}"
        kept = decoder_dtype(each, dtype) if each.name == "vae" else dtype
        yield _told(name, partial(each.nbytes, kept), str(kept).removeprefix("torch."))


def _peaks(
    settings: ModelSettings, dtype: torch.dtype, folder: Path | None, locate: Callable[[str], Path | str]
) -> Iterator[Part]:
    """Of the largest forward and the largest picture."""
    parts = {each.name: each for each in components(folder)} if folder is not None and folder.is_dir() else {}
    pixels = settings.limits.max_pixels
    tokens = max(settings.batch_tokens, pixels // TOKEN_PX**2)
    if "transformer" in parts:
        net, length = parts["transformer"], settings.max_sequence_length
    elif "unet" in parts:
        net, length = parts["unet"], CLIP_TOKENS
    else:
        yield Part("forward, decode", None, "the model has no folder here with a transformer or a unet")
        return
    yield _told("forward", partial(forward_bytes, net, dtype, tokens, length), f"{tokens} image tokens")
    if settings.speed.acceleration != "none":
        yield _told("remembered steps", partial(_remembered, net, dtype, tokens), f"{tokens} image tokens")
    beside = _local(settings.controlnet, locate) if settings.controlnet else None
    for net in components(beside) if beside is not None else []:
        yield _told("controlnet", partial(forward_bytes, net, dtype, tokens, length), "beside the forward")
    if vae := parts.get("vae"):
        kept = decoder_dtype(vae, dtype)
        yield _told("decode", lambda: decode_bytes(vae, kept, pixels), f"{pixels / 1e6:.1f} megapixels")


def _remembered(net: Component, dtype: torch.dtype, tokens: int) -> int:
    """What the rows of a batch keep for `acceleration`: two tensors as wide as the transformer."""
    config = net.config()
    width: int = config["num_attention_heads"] * config["attention_head_dim"]
    return 2 * tokens * width * dtype.itemsize


def _stores(settings: ModelSettings, dtype: torch.dtype, folder: Path | None) -> Iterator[Part]:
    if folder is not None and folder.is_dir():
        staged = DENOISERS if settings.speed.compile != "none" else ()
        layers = [each for each in components(folder) if each.name not in ("vae", *staged)]
        yield _told(
            "LoRA bank", lambda: _bank(layers, dtype, settings.lora_rank), f"rank {settings.lora_rank}"
        )
    if settings.bases != BaseSettings():
        yield Part("base models", settings.bases.memory_bytes, "the one at the start included")
    yield Part("adapters", settings.adapter_bytes)
    yield Part("texts and pictures", settings.text_cache_bytes + settings.picture_cache_bytes)


def _stage(settings: ModelSettings, dtype: torch.dtype, folder: Path | None) -> Iterator[Part]:
    """The bank of compiled blocks: there from the start, and a second time as its stage."""
    if settings.speed.compile != "none" and folder is not None and folder.is_dir():
        layers = [each for each in components(folder) if each.name in DENOISERS]
        rank = settings.lora_rank
        yield _told("LoRA bank and stage", lambda: 2 * _bank(layers, dtype, rank), f"rank {rank}, twice")


def _bank(parts: list[Component], dtype: torch.dtype, rank: int) -> int:
    """If adapters target every layer."""
    modules = [module for part in parts for module in part.module().modules()]
    layers = [each.weight for each in modules if isinstance(each, nn.Linear | nn.Conv2d)]
    return sum(rank * (weight[0].numel() + len(weight)) for weight in layers) * dtype.itemsize


def _told(name: str, measure: Callable[[], int], note: str) -> Part:
    try:
        return Part(name, measure(), note)
    except UNREADABLE as error:  # a guess must not keep a model from starting
        return Part(name, None, f"cannot be told: {type(error).__name__}: {error}")


def _local(source: str, locate: Callable[[str], Path | str]) -> Path | None:
    """A source's folder or file, also one that came from the Hub before; None where it is not here."""
    found = locate(source)
    if isinstance(found, Path):
        return found
    try:
        index = [try_to_load_from_cache(found, name) for name in ("model_index.json", "config.json")]
    except ValueError:  # no Hub id either
        return None
    return next((Path(each).parent for each in index if isinstance(each, str)), None)


def _sum(parts: tuple[Part, ...]) -> int:
    return sum(part.nbytes or 0 for part in parts)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"
