"""IP-Adapter files of every kind that is published, for tiny UNets and full-size ones, and image encoders.

The names stand here a second time on purpose: they are what the files of others look like.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from pipelines.sd.image_encoder import ImageFeatures
from pipelines.sd.ip_adapter import IpAdapterKind
from tests.support import sd_controlnets

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]

HEIGHT, WIDTH = 8, 16  # of the latents: diffusers guesses the grids of masks right
FACE = 512


@dataclass(frozen=True)
class Sizes:
    """Of a projection, beside the width of its tokens."""

    embedding: int = 20
    hidden: int = 28
    inner: int = 24  # of a resampler
    heads: int = 2
    queries: int = 5  # of a resampler without a face
    tokens: int = 4
    face_inner: int = 1024


TINY = Sizes()


def projection(kind: IpAdapterKind, width: int, sizes: Sizes = TINY) -> Shapes:
    """What follows "image_proj." in a file."""
    match kind:
        case "plain":
            return {**_layer("proj", sizes.tokens * width, sizes.embedding), **_layer("norm", width)}
        case "full":
            return {
                **_layer("proj.0", sizes.hidden, sizes.hidden),
                **_layer("proj.2", width, sizes.hidden),
                **_layer("proj.3", width),
            }
        case "plus":
            return _with_latents(width, sizes.hidden, sizes)
        case "instantid":
            return _with_latents(width, FACE, sizes)
        case "faceid":
            return _face(width, sizes)
        case "faceid_plus":
            resampler = _resampler(width, sizes.hidden, width, sizes)
            return _face(width, sizes) | {
                f"perceiver_resampler.{name}": each for name, each in resampler.items()
            }


def _layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _face(width: int, sizes: Sizes) -> Shapes:
    return {
        **_layer("proj.0", sizes.face_inner, FACE),
        **_layer("proj.2", sizes.tokens * width, sizes.face_inner),
        **_layer("norm", width),
    }


def _with_latents(width: int, read: int, sizes: Sizes) -> Shapes:
    return {"latents": (1, sizes.queries, sizes.inner), **_resampler(width, read, sizes.inner, sizes)}


def _resampler(width: int, read: int, inner: int, sizes: Sizes) -> Shapes:
    shapes = {
        **_layer("proj_in", inner, read),
        **_layer("proj_out", width, inner),
        **_layer("norm_out", width),
    }
    attended = 64 * sizes.heads
    for number in range(4):
        attention, feed = f"layers.{number}.0", f"layers.{number}.1"
        shapes |= {
            **_layer(f"{attention}.norm1", inner),
            **_layer(f"{attention}.norm2", inner),
            f"{attention}.to_q.weight": (attended, inner),
            f"{attention}.to_kv.weight": (2 * attended, inner),
            f"{attention}.to_out.weight": (inner, attended),
            **_layer(f"{feed}.0", inner),
            f"{feed}.1.weight": (4 * inner, inner),
            f"{feed}.3.weight": (inner, 4 * inner),
        }
    return shapes


def weights(unet: Any) -> Shapes:
    """What follows "ip_adapter.": keys and values, numbered 1, 3, 5 …"""
    modules = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    return {
        f"{2 * index + 1}.to_{layer}_ip.weight": tuple(_weight(unet, name, f"to_{layer}").shape)
        for index, name in enumerate(modules)
        for layer in "kv"
    }


def loras(unet: Any, rank: int = 3) -> Shapes:
    """FaceID's, numbered 0, 1, 2 …"""
    shapes: Shapes = {}
    for number, name in enumerate(unet.attn_processors):
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            out, read = _weight(unet, name, layer + (".0" if layer == "to_out" else "")).shape
            shapes[f"{number}.{layer}_lora.down.weight"] = rank, read
            shapes[f"{number}.{layer}_lora.up.weight"] = out, rank
    return shapes


def _weight(unet: Any, processor: str, layer: str) -> Tensor:
    weight: Tensor = unet.get_submodule(f"{processor.removesuffix('.processor')}.{layer}").weight
    return weight


def shapes(kind: IpAdapterKind, unet: Any, sizes: Sizes = TINY, lora: bool | None = None) -> Shapes:
    """A whole file. FaceID's have LoRAs, unless told otherwise."""
    width = unet.config.cross_attention_dim
    adapter = weights(unet)
    if kind in ("faceid", "faceid_plus") if lora is None else lora:
        adapter |= loras(unet)
    return {
        **{f"image_proj.{name}": each for name, each in projection(kind, width, sizes).items()},
        **{f"ip_adapter.{name}": each for name, each in adapter.items()},
    }


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int = 1) -> Tensors:
    """Random tensors that neither die out nor explode."""
    generator = torch.Generator("cpu").manual_seed(seed)
    tensors: Tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("weight")
        tensors[name] = noise / 10 + is_norm if len(shape) == 1 else noise / math.sqrt(shape[-1])
    return tensors


def adapter(kind: IpAdapterKind, unet: Any, seed: int = 1, lora: bool | None = None) -> Tensors:
    return drawn(shapes(kind, unet, lora=lora), seed)


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def nested(tensors: Tensors) -> dict[str, Tensors]:
    """As diffusers reads a file."""
    return {
        part: {
            key.removeprefix(f"{part}."): each for key, each in tensors.items() if key.startswith(f"{part}.")
        }
        for part in ("image_proj", "ip_adapter")
    }


def base(name: str) -> Any:
    return sd_controlnets.base(name)


def inputs(name: str, rows: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> dict[str, Any]:
    """What the UNet of a base is called with."""
    given = sd_controlnets.inputs(name, rows)
    generator = torch.Generator("cpu").manual_seed(7)
    return given | {"sample": torch.randn(rows, 4, *size, generator=generator)}


def one_row(inputs: Mapping[str, Any], row: int) -> dict[str, Any]:
    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(each) for name, each in value.items()}
        return None if value is None else value[row : row + 1]

    return {name: cut(value) for name, value in inputs.items()}


class Stock:
    """diffusers' own IP-Adapters on a UNet of its own."""

    def __init__(self, unet: Any, *adapters: Tensors) -> None:
        self.unet = deepcopy(unet)
        self.unet._load_ip_adapter_weights([nested(each) for each in adapters])

    @property
    def projections(self) -> Any:
        return self.unet.encoder_hid_proj.image_projection_layers

    def scale(self, *scales: float) -> None:
        for processor in self.unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = list(scales)

    def answer(
        self, inputs: Mapping[str, Any], features: list[Tensor], masks: list[Tensor] | None = None
    ) -> Tensor:
        """The prediction; `features` of each adapter are [rows, pictures, …], masks [1, pictures, h, w]."""
        return predict(
            self.unet,
            {
                **inputs,
                "added_cond_kwargs": {**(inputs["added_cond_kwargs"] or {}), "image_embeds": features},
            },
            cross_attention_kwargs={"ip_adapter_masks": masks} if masks else None,
        )


@torch.inference_mode()
def predict(unet: Any, inputs: Mapping[str, Any], **more: Any) -> Tensor:
    prediction: Tensor = unet(**inputs, **more, return_dict=False)[0]
    return prediction


VISION: dict[str, Any] = {
    "hidden_size": TINY.hidden,
    "intermediate_size": 37,
    "projection_dim": TINY.embedding,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "gelu",
}
PATCHES = 17  # with the class token


def vision(**changes: Any) -> Any:
    with _drawing(3):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**(VISION | changes)))
    return model.eval().requires_grad_(False)


def write_encoder(folder: Path, model: Any, name: str = "model.safetensors") -> Path:
    """A folder with an encoder, as transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file(model.state_dict(), folder / name)
    return folder


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def seen(seed: int = 5) -> tuple[ImageFeatures, Tensor]:
    """What CLIP says of a picture, and its face."""
    generator = torch.Generator("cpu").manual_seed(seed)
    embedding = torch.randn(TINY.embedding, generator=generator)
    hidden = torch.randn(PATCHES, TINY.hidden, generator=generator)
    face = torch.randn(FACE, generator=generator)
    return ImageFeatures(embedding, hidden), face / face.norm()
