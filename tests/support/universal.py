"""fal-ai/lora/image-to-image on the embedded models: what requests name, and the way to their latents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pipelines import zoo
from pipelines.base import Generation
from pipelines.engine.engine import Engine
from pipelines.faces import FaceAnalyser
from pipelines.sd.grid import Grid, draw_noise
from pipelines.sd.ip_adapter import IpAdapterKind
from pipelines.sd.lora_image_to_image import Pipeline
from pipelines.sd.model import SdModel
from schemas.endpoints.lora_image_to_image import Input
from schemas.settings import Limits, ModelSettings
from tests.support import sd_ip_adapters
from tests.support.assets import given
from tests.support.engine import run_to_end
from tests.support.sd_controlnets import stirred, write

UNIVERSAL = "fal-ai/lora/image-to-image"
KINDS = ("sd15", "sd2", "sdxl")
SIDE = 96  # of a picture without a start picture, here
SMALL = Limits(max_pixels=SIDE * SIDE)
START = "http://pictures/start.png"
FACES = ("ann", "bob", "nobody")

Files = dict[str, Any]


def blocks(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Large blocks of colour."""
    colours = np.random.default_rng(seed).integers(0, 255, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


class Studio:
    """A server's model, small pictures on it, and files that requests may name by a word.

    Words are the embedded models', START, "other" and "square" of pictures, "black", "white" and "left" of
    masks in START's size, and what is added to `files`.
    """

    def __init__(self, root: Path, limits: Limits = SMALL, **settings: Any) -> None:
        self.root = root
        self.limits = limits
        self.folders = {kind: zoo.locate(kind, root / "zoo") for kind in KINDS}
        known = {"model": str(self.folders["sd15"]), "endpoints": ("any",), "limits": limits}
        self.model = SdModel.load(ModelSettings(**(known | settings)), Path)
        self.pipe = Pipeline(self.model)
        half = Image.new("RGB", (96, 64), "black")
        half.paste("white", (0, 0, 48, 64))
        self.files: Files = {
            **self.folders,
            START: blocks(0),
            "other": blocks(1),
            "square": blocks(2, (SIDE, SIDE)),
            "black": Image.new("RGB", (96, 64), "black"),
            "white": Image.new("RGB", (96, 64), "white"),
            "left": half,
        }

    @cached_property
    def stock(self) -> dict[str, Any]:
        """The embedded models as diffusers' pipelines, never changed."""
        kinds = dict.fromkeys(KINDS, StableDiffusionPipeline) | {"sdxl": StableDiffusionXLPipeline}
        return {name: kinds[name].from_pretrained(folder) for name, folder in self.folders.items()}

    def wish(self, **fields: Any) -> Input:
        """A checked request for few steps."""
        known = {"model_name": "sd15", "prompt": "a red square", "num_inference_steps": 3, "seed": 7}
        wish = Input.model_validate(known | fields)
        wish.check(self.limits)
        return wish

    def prepare(self, files: Files | None = None, /, **fields: Any) -> Generation:
        wish = self.wish(**fields)
        return self.pipe.prepare(wish, given(wish, self.files | (files or {})), seed=0)

    def finish(self, *generations: Generation) -> list[Tensor]:
        """The finished latents of each, [images, 4, rows, columns], all through one engine."""
        samples = [each for generation in generations for each in generation.samples]
        ears = run_to_end(Engine(self.model.predict, 1 << 20), [each for each in samples if not each.is_done])
        for error in filter(None, ears.ends.values()):
            raise error
        for generation in generations:
            generation.resources.close()
        return [torch.stack([each.latents for each in generation.samples]) for generation in generations]

    def run(self, files: Files | None = None, /, **fields: Any) -> Tensor:
        [latents] = self.finish(self.prepare(files, **fields))
        return latents

    # -- files of each kind, for one of the embedded models

    def lora(self, seed: int = 0, name: str = "sd15") -> Path:
        """One on attention layers of the UNet and of the text encoders, as peft spells it."""
        path = self._path(f"lora-{seed}-{name}")
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        with self.base(name) as base:
            targets = base.targets
        for layer, (rows, columns, *_) in targets.items():
            if layer.endswith(("to_q", "to_v", "q_proj")):
                tensors[f"{layer}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
                tensors[f"{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
        save_file(tensors, path)
        return path

    def net(self, seed: int = 2, name: str = "sd15") -> Any:
        """A ControlNet as diffusers has it."""
        unet = self.stock[name].unet
        return stirred(
            ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8)), seed
        )

    def controlnet(self, seed: int = 2, name: str = "sd15") -> Path:
        path = self._path(f"net-{seed}-{name}")
        return write(path, dict(self.net(seed, name).state_dict()))

    def ip_adapter(self, kind: IpAdapterKind = "plain", seed: int = 1, name: str = "sd15") -> Path:
        path = self._path(f"{kind}-{seed}-{name}")
        return sd_ip_adapters.write(path, sd_ip_adapters.adapter(kind, self.stock[name].unet, seed))

    def encoder(self, **changes: Any) -> Path:
        """An image encoder's folder."""
        name = "encoder" + "".join(f"-{key}-{value}" for key, value in changes.items())
        return sd_ip_adapters.write_encoder(self.root / name, sd_ip_adapters.vision(**changes))

    def offsets(self, channels: int, size: float = 0.02, name: str = "sd15") -> Path:
        """IC-Light's."""
        generator = torch.Generator().manual_seed(5)
        tensors = {}
        for key, weight in self.stock[name].unet.state_dict().items():
            shape = list(weight.shape)
            if key == "conv_in.weight":
                shape[1] = channels
            tensors[key] = size * torch.randn(shape, generator=generator)
        return write(self._path(f"light-{channels}-{size}-{name}"), tensors)

    def vectors(self, text: str, name: str = "sd15") -> dict[str, Tensor]:
        """What each text encoder reads for each letter of `text`, by the key of embedding files."""
        pipe, keys = self.stock[name], ("clip_l", "clip_g")
        tokenizers = [getattr(pipe, f"tokenizer{end}", None) for end in ("", "_2")]
        encoders = [getattr(pipe, f"text_encoder{end}", None) for end in ("", "_2")]
        found = {}
        for key, tokenizer, encoder in zip(keys, tokenizers, encoders, strict=True):
            if tokenizer is not None and encoder is not None:
                ids = tokenizer(text, add_special_tokens=False).input_ids
                found[key] = encoder.get_input_embeddings().weight[ids].detach().clone()
        return found

    def embedding(self, text: str = "q w", name: str = "sd15") -> Path:
        """A textual inversion that means a text of the model's own."""
        return write(self._path(f"words-{text}-{name}"), self.vectors(text, name))

    def changed(self, name: str, kind: str = "sd15", **components: Any) -> Path:
        """A model's folder where some components are others."""
        pipe = deepcopy(self.stock[kind])
        pipe.register_modules(**components)
        pipe.save_pretrained(self.root / name)
        return self.root / name

    @contextmanager
    def base(self, name: str) -> Iterator[Any]:
        """One of the embedded models as requests have it."""
        generation = self.prepare(model_name=name)
        with generation.resources:
            yield generation.samples[0].plan.base  # type: ignore[attr-defined]

    def look_for_faces(self) -> None:
        """The folders "ann" and "bob" find that one's face in every picture, "nobody" none."""

        def faces(folder: Path) -> FaceAnalyser:
            found = [] if folder.name == "nobody" else [face(FACES.index(folder.name))]
            return FaceAnalyser(SimpleNamespace(get=lambda picture: found))

        self.model._faces = faces  # type: ignore[assignment]
        self.files |= {each: self.root / each for each in FACES}

    def _path(self, name: str) -> Path:
        return self.root / f"{name}.safetensors"


def face(seed: int) -> Any:
    """As insightface gives it."""
    return SimpleNamespace(
        embedding=np.random.default_rng(seed).normal(size=512).astype(np.float32),
        kps=np.zeros((5, 2), np.float32),
        bbox=np.array([0, 0, 20, 20], np.float32),
    )


def by_stock(pipe: Any, scheduler: Any, **words: Any) -> Tensor:
    """What diffusers' pipeline makes of the usual request in Euler's steps, [1, 4, rows, columns]."""
    pipe.scheduler = EulerDiscreteScheduler.from_config(scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    known = {"prompt": "a red square", "negative_prompt": "", "num_inference_steps": 3, "guidance_scale": 7.5}
    latents = draw_noise(Grid.of(SIDE, SIDE), 7)[None]
    sizes = {"height": SIDE, "width": SIDE, "output_type": "latent"}
    found: Tensor = pipe(**known | sizes | words, latents=latents).images
    return found


def close(one: Tensor, other: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def differ(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 1e-3


def same(*all_of_them: Tensor) -> None:
    """To the bit."""
    first, *others = all_of_them
    assert all(torch.equal(first, each) for each in others)


def grow(effects: Sequence[Tensor], origin: Tensor) -> None:
    """Each is further from the origin than the one before, and the first is not there."""
    distances = [0.0, *(float((each - origin).norm()) for each in effects)]
    assert all(one < other for one, other in zip(distances, distances[1:], strict=False)), distances
