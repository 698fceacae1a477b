"""lora/image-to-image: the words that say which of a repository's files are meant."""

from pathlib import Path
from typing import Any

import pytest

from schemas.assets import AssetKind, assets
from schemas.endpoints.lora_image_to_image import Input
from tests.support.fields import shows
from tests.support.hub import serving
from tests.support.universal import START, UNIVERSAL
from tests.unit.deployments.places import Place, get, safetensors


async def which(tmp_path: Path, **fields: Any) -> list[bytes]:
    """The weights that a request leads to in the repositories of a hub."""
    net = "diffusion_pytorch_model"
    stored = {f"models/{name}.safetensors": safetensors(fill=name.encode(), size=1) for name in "ab"}
    stored |= {"sdxl/a.safetensors": safetensors(1, b"c"), "config.json": b"{}"}
    stored |= {f"{net}.safetensors": safetensors(1, b"d"), f"{net}.fp16.safetensors": safetensors(1, b"e")}
    stored |= {f"enc/{name}.safetensors": safetensors(1, name[:1].encode()) for name in ("model", "small")}
    stored |= {"enc/config.json": b"{}", "other/model.safetensors": safetensors(1, b"o")}
    async with serving() as hub:
        hub.put_files("ann/all", stored)
        weights = Place(tmp_path, hub.url).open()
        request = Input.model_validate({"model_name": "ann/none", "prompt": "x"} | fields)
        found = []
        for ref in assets(request):
            if ref.asset.kind.is_weights and ref.asset.kind is not AssetKind.BASE:
                with await get(weights, ref.asset) as path:
                    inside = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
                    found += [each.read_bytes()[-1:] for each in inside]
    return found


@shows(UNIVERSAL, "ip_adapter.model_subfolder", "ip_adapter.weight_name")
@pytest.mark.parametrize(
    ("words", "file"),
    [
        ({"model_subfolder": "models", "weight_name": "a.safetensors"}, b"a"),
        ({"model_subfolder": "models", "weight_name": "b.safetensors"}, b"b"),
        ({"model_subfolder": "models", "weight_name": "b.bin"}, b"b"),  # the safetensors beside a pickle
        ({"model_subfolder": "sdxl"}, b"c"),
    ],
)
async def test_words_say_which_of_a_repositorys_adapters_is_meant(
    tmp_path: Path, words: dict[str, str], file: bytes
) -> None:
    adapter = {"path": "ann/all", "ip_adapter_image_url": START, **words}
    assert await which(tmp_path, ip_adapter=[adapter]) == [file]


@shows(UNIVERSAL, "image_encoder_subfolder", "image_encoder_weight_name")
@pytest.mark.parametrize(
    ("words", "file"),
    [
        ({"image_encoder_subfolder": "enc"}, b"m"),
        ({"image_encoder_subfolder": "enc", "image_encoder_weight_name": "small.safetensors"}, b"s"),
        ({"image_encoder_subfolder": "other"}, b"o"),
    ],
)
async def test_words_say_which_of_a_repositorys_encoders_is_meant(
    tmp_path: Path, words: dict[str, str], file: bytes
) -> None:
    assert await which(tmp_path, image_encoder_path="ann/all", **words) == [file]


@shows(UNIVERSAL, "controlnets.variant")
@pytest.mark.parametrize(("words", "file"), [({}, b"d"), ({"variant": "fp16"}, b"e")])
async def test_a_variant_is_of_a_controlnets_files(
    tmp_path: Path, words: dict[str, str], file: bytes
) -> None:
    net = {"path": "ann/all", "image_url": START, **words}
    assert await which(tmp_path, controlnets=[net]) == [file]
