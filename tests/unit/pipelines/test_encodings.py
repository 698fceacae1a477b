"""Texts and pictures that come again: nothing but the time differs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pipelines.adapters.bank import LoraUse
from pipelines.flux.model import FluxModel
from pipelines.flux.plan import Conditioning
from pipelines.flux.sampling import Grid
from pipelines.sd import loading
from pipelines.sd.base import Base
from pipelines.sd.text import Encoding
from schemas.settings import ModelSettings
from tests.support.universal import KINDS, START, Studio, blocks, differ, same

OFF: dict[str, Any] = {"text_cache_bytes": 0, "picture_cache_bytes": 0}
EVERY = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="module")
def forgetful(root: Path) -> Studio:
    """Keeps nothing."""
    return Studio(root, **OFF)


@pytest.fixture
def studio(root: Path) -> Studio:
    made = Studio(root)
    for name in KINDS:
        made.files |= {f"lora-{seed}-{name}": made.lora(seed, name) for seed in (0, 1)}
    made.model._encodings.texts.clear()
    return made


def wishes(name: str) -> list[dict[str, Any]]:
    """Whose texts are encoded differently, in every way that there is."""
    lora = {"path": f"lora-0-{name}"}
    return [
        {},
        {"prompt": "a blue square"},
        {"negative_prompt": "grey"},
        {"clip_skip": 1},
        {"prompt": "a (red:1.4) square"},
        {"prompt": "a (red:1.4) square", "prompt_weighting": True},
        {"prompt": "a (red:0.6) square", "prompt_weighting": True},
        {"prompt": " ".join(["word"] * 100), "prompt_weighting": True},
        {"loras": [lora]},
        {"loras": [{**lora, "scale": 0.5}]},
        {"loras": [{"path": f"lora-1-{name}"}]},
        {"embeddings": [{"path": f"words-q-{name}", "tokens": ["red"[::-1]]}], "prompt": "a der square"},
        {"embeddings": [{"path": f"words-w-{name}", "tokens": ["red"[::-1]]}], "prompt": "a der square"},
        {"image_url": START},
        {"image_url": "other"},
    ]


@EVERY
def test_requests_that_come_again_are_the_same_to_the_bit(
    studio: Studio, forgetful: Studio, name: str
) -> None:
    studio.files |= {f"words-{text}-{name}": studio.embedding(text, name) for text in "qw"}
    forgetful.files |= studio.files
    every = [{"image_url": START, "model_name": name, **wish} for wish in wishes(name)]
    expected = [forgetful.run(**wish) for wish in every]
    assert not forgetful.model._encodings.texts.names
    for wish, latents in zip(every * 2, expected * 2, strict=True):
        same(studio.run(**wish), latents)


@pytest.fixture
def encoded(studio: Studio) -> Iterator[list[Any]]:
    """What the text encoders of the studio's own model are given, call by call."""
    seen: list[Any] = []
    [encoder] = studio.model.base._parts.text_encoders
    hook = encoder.register_forward_pre_hook(lambda module, given: seen.append(given))
    yield seen
    hook.remove()


def test_equal_texts_are_encoded_once_whoever_asks(studio: Studio, encoded: list[Any]) -> None:
    studio.prepare(negative_prompt="grey").resources.close()
    assert len(encoded) == 2
    studio.prepare(negative_prompt="grey", seed=3, guidance_scale=2).resources.close()
    assert len(encoded) == 2
    studio.prepare(negative_prompt="grey", prompt="a blue square").resources.close()
    assert len(encoded) == 3


def test_a_lora_that_leaves_the_texts_alone_does_not_part_them(studio: Studio, encoded: list[Any]) -> None:
    file = studio.root / "unet-only.safetensors"
    layer = next(each for each in studio.model.base.targets if each.endswith("to_v"))
    rows, columns, *_ = studio.model.base.targets[layer]
    weights = {"A": torch.randn(4, columns), "B": torch.randn(rows, 4)}
    save_file({f"{layer}.lora_{end}.weight": each for end, each in weights.items()}, file)
    plain = studio.run()
    changed = studio.run({"mine": file}, loras=[{"path": "mine"}])
    differ(plain, changed)
    assert len(encoded) == 2


def test_what_is_kept_stays_as_it_was(studio: Studio) -> None:
    def values() -> list[Tensor]:
        caches = studio.model._encodings.texts, studio.model._encodings._pictures
        kept = [value for cache in caches for value in cache._values.values()]
        return [each.tokens if isinstance(each, Encoding) else each for each in kept]

    for noise in (0.0, 0.6):
        studio.run(image_url=START, noise_strength=noise, num_images=2)
    before = [each.clone() for each in values()]
    for noise in (0.0, 0.6):
        studio.run(image_url=START, noise_strength=noise, num_images=2)
    assert len(before) == 3  # two texts and a picture
    for kept, one in zip(values(), before, strict=True):
        same(kept, one)


def test_a_model_loaded_anew_is_another(studio: Studio) -> None:
    base = studio.model.base
    parts = loading.inspect(studio.folders["sd15"], torch.float32).load("cpu")
    again = Base(base.name, parts, studio.model._encodings, 8, 1024)
    for each in (base, again):
        each.encode_texts(["a red square"])
    assert len(studio.model._encodings.texts.names) == 2


@pytest.fixture
def pair(flux_folder: Path) -> tuple[FluxModel, FluxModel]:
    """One that keeps, one that does not."""
    known: dict[str, Any] = {"model": str(flux_folder), "endpoints": ("any",), "max_sequence_length": 32}
    keeps, keeps_not = (FluxModel.load(ModelSettings(**known, **more), Path) for more in ({}, OFF))
    return keeps, keeps_not


def test_flux_gives_the_same_to_the_bit(
    pair: tuple[FluxModel, FluxModel], lora_files: dict[str, Path]
) -> None:
    keeps, keeps_not = pair
    loras = {path.name: keeps.read_lora(path) for path in lora_files.values()}
    uses = [(), *((LoraUse(name, scale),) for name in loras for scale in (1.0, 0.5))]
    cases = [(prompt, use) for prompt in ("", "a red square", "A red square") for use in uses]
    with keeps.holding(loras), keeps_not.holding(loras):
        expected = [keeps_not.encode_prompt(*case) for case in cases]
        for case, text in zip(cases * 2, expected * 2, strict=True):
            found: Conditioning = keeps.encode_prompt(*case)
            same(found.tokens, text.tokens)
            same(found.pooled, text.pooled)
    assert len(keeps._encodings.texts.names) == len(cases)
    assert not keeps_not._encodings.texts.names


def test_pictures_are_known_by_what_is_seen_of_them(pair: tuple[FluxModel, FluxModel]) -> None:
    keeps, keeps_not = pair
    pictures = [blocks(0), blocks(1), blocks(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    grids = [Grid.of(96, 64), Grid.of(64, 96), Grid.of(64, 64)]
    for picture in pictures * 2:
        for grid in grids:
            same(keeps.encode_image(picture, grid), keeps_not.encode_image(picture.copy(), grid))
    assert len(keeps._encodings._pictures.names) == 9
