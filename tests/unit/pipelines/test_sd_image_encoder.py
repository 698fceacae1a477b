"""CLIP's image encoder tells what diffusers' pipelines make it tell; files that are none are refused."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModelWithProjection

from pipelines.sd import image_encoder
from pipelines.sd.image_encoder import ImageEncoder, load
from schemas.errors import AssetError
from tests.support import sd_ip_adapters
from tests.support.sd_ip_adapters import PATCHES, TINY, VISION, write_encoder

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
Tensors = dict[str, Tensor]

model_of = cache(sd_ip_adapters.vision)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "image_encoder", model_of())


@pytest.fixture
def encoder(folder: Path) -> ImageEncoder:
    return load(folder, "cpu", torch.float32)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def picture(width: int = 50, height: int = 40) -> Image.Image:
    return Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 50).convert("RGB")


@torch.inference_mode()
def theirs(given: Image.Image) -> list[tuple[Tensor, Tensor]]:
    """diffusers' positive and negative: the embedding's, then the hidden states'."""
    side = VISION["image_size"]
    pipe = SimpleNamespace(
        image_encoder=model_of(), feature_extractor=CLIPImageProcessorPil(size=side, crop_size=side)
    )
    pipe.encode_image = lambda *more: StableDiffusionPipeline.encode_image(pipe, *more)
    pipe.unet = SimpleNamespace(encoder_hid_proj=SimpleNamespace())
    found = []
    for projection in (ImageProjection(TINY.embedding, 8, 4), torch.nn.Identity()):
        pipe.unet.encoder_hid_proj.image_projection_layers = [projection]
        (both,) = StableDiffusionPipeline.prepare_ip_adapter_image_embeds(pipe, [given], None, "cpu", 1, True)
        negative, positive = both[:, 0]
        found.append((positive, negative))
    return found


@pytest.mark.parametrize("size", [(32, 32), (50, 40), (33, 200), (8, 9), (500, 60)])
def test_features_are_diffusers(size: tuple[int, int], encoder: ImageEncoder) -> None:
    (embedding, no_embedding), (hidden, no_hidden) = theirs(picture(*size))
    found, nothing = encoder.features(picture(*size)), encoder.negative(0, generator())
    torch.testing.assert_close(found.embedding, embedding, **CLOSE)
    torch.testing.assert_close(found.hidden, hidden, **CLOSE)
    assert torch.equal(nothing.embedding, no_embedding)
    torch.testing.assert_close(nothing.hidden, no_hidden, **CLOSE)
    assert found.embedding.shape == (TINY.embedding,) and found.hidden.shape == (PATCHES, TINY.hidden)


def test_of_a_very_long_picture_the_middle_is_seen(encoder: ImageEncoder) -> None:
    """Resizing all of it would take a gigabyte for a picture of a megabyte."""
    lines = Image.new("RGB", (60_000, 2), "white")
    lines.paste((200, 30, 30), (29_990, 0, 30_010, 2))
    short = lines.crop((29_984, 0, 30_016, 2))
    assert image_encoder._not_too_long(lines).size == (32, 2)
    torch.testing.assert_close(encoder.features(lines).hidden, encoder.features(short).hidden, **CLOSE)
    turned = encoder.features(lines.transpose(Image.Transpose.ROTATE_90))
    expected = encoder.features(short.transpose(Image.Transpose.ROTATE_90))
    torch.testing.assert_close(turned.hidden, expected.hidden, **CLOSE)


@torch.inference_mode()
def test_the_unconditional_picture_may_be_noise(encoder: ImageEncoder) -> None:
    noise = torch.rand(3, 32, 32, generator=generator()) * 0.5
    told = model_of()(noise[None], output_hidden_states=True)
    for found in (encoder.of_noise(0.5, generator()), encoder.negative(0.5, generator())):
        torch.testing.assert_close(found.embedding, told.image_embeds[0], **CLOSE)
        torch.testing.assert_close(found.hidden, told.hidden_states[-2][0], **CLOSE)
    assert not torch.equal(encoder.negative(0.5, generator(2)).hidden, found.hidden)


def test_without_noise_nothing_is_drawn(encoder: ImageEncoder) -> None:
    source = generator()
    before = source.get_state()
    nothing = encoder.negative(0, source)
    assert torch.equal(source.get_state(), before)
    assert not nothing.embedding.any()
    torch.testing.assert_close(nothing.hidden, encoder.of_noise(0, source).hidden, **CLOSE)


def test_threads_do_not_see_each_others_pictures(encoder: ImageEncoder) -> None:
    pictures = [picture(40 + 8 * each, 40) for each in range(6)]
    alone = [encoder.features(each).hidden for each in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(encoder.features, pictures * 4))
    for index, found in enumerate(together):
        torch.testing.assert_close(found.hidden, alone[index % 6], **CLOSE)


# How an encoder may lie there: what is written, and what is loaded.


def plain(root: Path) -> Path:
    return write_encoder(root, model_of())


def of_any_name(root: Path) -> Path:
    return write_encoder(root, model_of(), "clip_vision_tiny.safetensors")


def beside_a_config(root: Path) -> Path:
    return plain(root) / "model.safetensors"


def with_positions(root: Path) -> Path:
    """As transformers saved it until 4.31."""
    plain(root)
    ids = torch.arange(PATCHES)[None]
    save_file(
        model_of().state_dict() | {"vision_model.embeddings.position_ids": ids}, root / "model.safetensors"
    )
    return root


def saved(root: Path) -> Path:
    model_of().save_pretrained(root)
    return root


def in_shards(root: Path) -> Path:
    write_encoder(root, model_of())
    tensors = load_file(root / "model.safetensors")
    (root / "model.safetensors").unlink()
    halves = [dict([*tensors.items()][at::2]) for at in range(2)]
    for number, half in enumerate(halves, 1):
        save_file(half, root / f"model-0000{number}-of-00002.safetensors")
    return root


def whole_clip(root: Path) -> Path:
    """With its text encoder, as CLIP is published."""
    root.mkdir(parents=True)
    config = CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 99,
                     "num_attention_heads": 2, "projection_dim": TINY.embedding},
        vision_config=VISION, projection_dim=TINY.embedding,
    )  # fmt: skip
    clip = CLIPModel(config)
    tensors = clip.state_dict() | model_of().state_dict()
    (root / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({name: each.contiguous() for name, each in tensors.items()}, root / "model.safetensors")
    return root


@pytest.mark.parametrize(
    "lay", [plain, of_any_name, beside_a_config, with_positions, saved, in_shards, whole_clip]
)
def test_an_encoder_loads_however_it_lies_there(
    lay: Callable[[Path], Path], tmp_path: Path, encoder: ImageEncoder
) -> None:
    found = load(lay(tmp_path / "other"), "cpu", torch.float32)
    assert torch.equal(found.features(picture()).embedding, encoder.features(picture()).embedding)
    assert torch.equal(found.features(picture()).hidden, encoder.features(picture()).hidden)


def test_a_variant_is_preferred_where_it_is(folder: Path) -> None:
    other = {name: tensor * 2 for name, tensor in model_of().state_dict().items()}
    save_file(other, folder / "model.fp16.safetensors")
    usual, variant, absent = (
        load(folder, "cpu", torch.float32, variant=name).features(picture()).embedding
        for name in (None, "fp16", "bf16")
    )
    assert torch.equal(usual, absent) and not torch.equal(usual, variant)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_encoder_is_kept_as_asked(dtype: torch.dtype, folder: Path) -> None:
    found = load(folder, "cpu", dtype)
    features = found.features(picture())
    assert features.embedding.dtype == features.hidden.dtype == dtype
    numbers = sum(each.numel() for each in model_of().parameters())
    assert found.nbytes == numbers * dtype.itemsize


# Those that adapters are made for (h94/IP-Adapter; OpenAI's L), and their millions of parameters as
# https://github.com/mlfoundations/open_clip lists them.
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
)
PUBLISHED: dict[str, tuple[tuple[Any, ...], float]] = {
    "ViT-H": ((1280, 5120, 1024, 32, 16, 224, 14, "gelu"), 632.08),
    "ViT-bigG": ((1664, 8192, 1280, 48, 16, 224, 14, "gelu"), 1844.91),
    "ViT-L": ((1024, 4096, 768, 24, 16, 224, 14, "quick_gelu"), 303.97),
    "ViT-L 336": ((1024, 4096, 768, 24, 16, 336, 14, "quick_gelu"), 304.29),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_alone_tell_the_config_of_those_that_are_published(name: str) -> None:
    values, millions = PUBLISHED[name]
    config = dict(zip(FIELDS, values, strict=True))
    with torch.device("meta"):
        model = sd_ip_adapters.vision(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert image_encoder._told(shapes) == config | {"num_channels": 3}
    assert sum(tensor.numel() for tensor in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_file_alone_loads_if_its_width_is_known(tmp_path: Path) -> None:
    model = model_of(hidden_size=768, num_attention_heads=12, num_hidden_layers=2, hidden_act="quick_gelu")
    path = tmp_path / "a"  # as the cache of fetched files names them: without a suffix
    save_file(model.state_dict(), path)
    found = load(path, "cpu", torch.float32).features(picture())
    side = VISION["image_size"]
    pixels = CLIPImageProcessorPil(size=side, crop_size=side)(picture(), return_tensors="pt").pixel_values
    torch.testing.assert_close(found.embedding, model(pixels).image_embeds[0], **CLOSE)


def test_a_file_alone_of_another_width_needs_its_config(tmp_path: Path) -> None:
    save_file(model_of().state_dict(), tmp_path / "a")
    assert "is 28 wide, and no known one is. It needs its config.json" in refusal(tmp_path / "a")


def refusal(source: Path) -> str:
    with pytest.raises(AssetError) as caught:
        load(source, "cpu", torch.float32)
    assert caught.value.kind == "invalid_weights"
    return caught.value.message


def test_what_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    assert "There is no image encoder at" in refusal(tmp_path / "none")
    (folder / "model.safetensors").rename(folder / "model.bin")
    assert "pickles (.bin, .pt, .ckpt), which are not loaded" in refusal(folder)
    for name in "ab":
        save_file(model_of().state_dict(), folder / f"{name}.safetensors")
    assert "has several files: a.safetensors, b.safetensors. Name one of them." in refusal(folder)
    (folder / "a.safetensors").unlink()
    (folder / "config.json").unlink()
    assert "has no image_encoder/config.json" in refusal(folder)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "siglip_vision_model"}, "is a siglip_vision_model, not CLIP's"),
    ({"model_type": None}, "is a None, not CLIP's"),
    ({"model_type": "clip"}, "config.json has no vision_config"),
    ({"hidden_size": 1 << 30}, "hidden_size is 1073741824"),
    ({"num_hidden_layers": 65}, "num_hidden_layers is 65"),
    ({"num_hidden_layers": 2}, "has no place for vision_model.encoder.layers.2."),
    ({"num_hidden_layers": 4}, "It lacks vision_model.encoder.layers.3."),
    ({"num_attention_heads": 5}, "config of the image encoder is not usable"),
    ({"intermediate_size": 38}, "does not fit its config"),
    ({"hidden_act": "none"}, "config of the image encoder is not usable"),
    ({"hidden_size": "28"}, "config of the image encoder is not usable"),
    ({"image_size": [32, 32]}, "image_size is \\[32, 32\\]"),
    ({"image_size": 0}, "image_size is 0"),
    ({"image_size": 2048}, "pictures of more than 1024 pixels a side"),
    ({"patch_size": 0}, "patch_size is 0"),
    ({"num_channels": 4}, "does not read RGB pictures"),
]


@pytest.mark.parametrize(("changes", "fault"), CONFIGS)
def test_configs_that_cannot_be_are_refused(changes: dict[str, Any], fault: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AssetError, match=fault):
        load(folder, "cpu", torch.float32)


WEIGHTS: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (lambda t: {"a": torch.zeros(1)}, "is not CLIP's image encoder as transformers names it: it has a."),
    (lambda t: t | {"more": torch.zeros(1)}, "has no place for more."),
    (lambda t: {k: v for k, v in t.items() if "visual_pro" not in k}, "It lacks visual_projection.weight."),
    (
        lambda t: t | {"visual_projection.weight": torch.zeros(20, 29)},
        "has the shape [20, 29] where [20, 28]",
    ),
    (lambda t: t | {"visual_projection.weight": torch.full((20, 28), torch.nan)}, "not finite numbers"),
]


@pytest.mark.parametrize(("change", "fault"), WEIGHTS)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[Tensors], Tensors], fault: str, folder: Path
) -> None:
    save_file(change(dict(model_of().state_dict())), folder / "model.safetensors")
    assert fault in refusal(folder)


ALONE: list[tuple[str, Tensor | None, str]] = [
    ("vision_model.embeddings.patch_embedding.weight", None, "is not complete. It lacks vision_model.embed"),
    ("vision_model.embeddings.patch_embedding.weight", torch.zeros(4), "has the shape [4]"),
    ("vision_model.embeddings.position_embedding.weight", torch.zeros(1, 768), "image_size is 0"),
    ("vision_model.encoder.layers.0.mlp.fc1.weight", None, "It lacks vision_model.encoder.layers.0.mlp.fc1"),
]


@pytest.mark.parametrize(("name", "tensor", "fault"), ALONE)
def test_files_alone_that_do_not_fit_are_refused(
    name: str, tensor: Tensor | None, fault: str, tmp_path: Path
) -> None:
    tensors = dict(model_of(hidden_size=768, num_attention_heads=12, num_hidden_layers=2).state_dict())
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, tmp_path / "a")
    assert fault in refusal(tmp_path / "a")


def test_the_model_is_transformers_own() -> None:
    assert isinstance(model_of(), CLIPVisionModelWithProjection)
