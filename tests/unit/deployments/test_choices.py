"""Which files of a repository a request means."""

from typing import Any

import pytest

from deployments.files.choices import Choice, choose
from schemas.assets import Asset, AssetKind
from schemas.errors import AssetError

IP = [  # as in h94/IP-Adapter
    "README.md",
    "models/image_encoder/config.json",
    "models/image_encoder/model.safetensors",
    "models/image_encoder/pytorch_model.bin",
    "models/ip-adapter_sd15.bin",
    "models/ip-adapter_sd15.safetensors",
    "models/ip-adapter_sd15_light.bin",
    "sdxl_models/ip-adapter_sdxl.safetensors",
]
DIFFUSERS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
NEVER = [
    ".gitattributes",
    "README.md",
    "unet/model.py",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "safety_checker/model.safetensors",
    "tokenizer/deep/vocab.json",
    "vae/deep/diffusion_pytorch_model.safetensors",
]


def chosen(kind: AssetKind, names: list[str], **wish: Any) -> Choice:
    return choose("ann/x", names, Asset(kind, "ann/x", **wish))


def refusal(kind: AssetKind, names: list[str], **wish: Any) -> str:
    with pytest.raises(AssetError) as raised:
        chosen(kind, names, **wish)
    return raised.value.message


@pytest.mark.parametrize(
    ("folder", "file", "wanted"),
    [
        ("models", "ip-adapter_sd15.safetensors", "models/ip-adapter_sd15.safetensors"),
        ("models/", "ip-adapter_sd15.safetensors", "models/ip-adapter_sd15.safetensors"),
        ("./models", "ip-adapter_sd15.safetensors", "models/ip-adapter_sd15.safetensors"),
        (None, "models/ip-adapter_sd15.safetensors", "models/ip-adapter_sd15.safetensors"),
        ("models", "ip-adapter_sd15.bin", "models/ip-adapter_sd15.safetensors"),
        ("sdxl_models", None, "sdxl_models/ip-adapter_sdxl.safetensors"),
        ("sdxl_models", "", "sdxl_models/ip-adapter_sdxl.safetensors"),
    ],
)
def test_a_folder_and_a_name_say_which_file(folder: str | None, file: str | None, wanted: str) -> None:
    assert chosen(AssetKind.IP_ADAPTER, IP, folder=folder, file=file) == wanted


@pytest.mark.parametrize(
    ("folder", "file", "words"),
    [
        (None, None, ["no .safetensors file at its top"]),
        ("absent", None, ["no .safetensors file in absent"]),
        (
            "models",
            "ip-adapter_sd15_light.bin",
            ["a pickle, which is not loaded", "models/ip-adapter_sd15.s"],
        ),
        (
            "models",
            "other.safetensors",
            ["It has no models/other", "ann/x/models/ip-adapter_sd15.safetensors"],
        ),
        ("models", "ip-adapter_sd15", ["It has no models/ip-adapter_sd15."]),
        (None, "README.md", ["README.md is no safetensors file"]),
        ("../models", "x.safetensors", ["It has no ../models/x.safetensors"]),
        ("models", "../../../etc/passwd", ["It has no ../../etc/passwd"]),
        ("/etc", "/etc/passwd", ["It has no etc/passwd"]),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    folder: str | None, file: str | None, words: list[str]
) -> None:
    told = refusal(AssetKind.IP_ADAPTER, IP, folder=folder, file=file)
    assert all(word in told for word in words), told


def test_several_files_without_a_name_are_listed() -> None:
    two = ["iclight_sd15_fc.safetensors", "iclight_sd15_fbc.safetensors"]
    told = refusal(AssetKind.IC_LIGHT, two)
    assert told == "Say which file: ann/x/iclight_sd15_fbc.safetensors, ann/x/iclight_sd15_fc.safetensors."
    assert chosen(AssetKind.EMBEDDING, ["a.safetensors", "learned_embeds.safetensors"]) == (
        "learned_embeds.safetensors"
    )
    pickles = refusal(AssetKind.EMBEDDING, ["learned_embeds.bin"])
    assert "no .safetensors file at its top. Pickles" in pickles


@pytest.mark.parametrize(
    ("files", "file", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin"], "pytorch_model.bin", "model.safetensors"),
        (
            ["model.safetensors", "pytorch_model.safetensors"],
            "pytorch_model.bin",
            "pytorch_model.safetensors",
        ),
        (["model.safetensors", "other.safetensors"], None, "model.safetensors"),
        (["other.safetensors"], "other.safetensors", "other.safetensors"),
    ],
)
def test_an_image_encoder_comes_with_its_config(files: list[str], file: str | None, wanted: str) -> None:
    names = [f"enc/{name}" for name in ("config.json", *files)]
    found = chosen(AssetKind.IMAGE_ENCODER, names, folder="enc", file=file)
    assert found == {wanted: f"enc/{wanted}", "config.json": "enc/config.json"}
    alone = chosen(AssetKind.IMAGE_ENCODER, names[1:], folder="enc", file=file)
    assert alone == f"enc/{wanted}"


def test_an_image_encoder_of_a_pickle_only_is_refused() -> None:
    told = refusal(AssetKind.IMAGE_ENCODER, ["pytorch_model.bin", "config.json"], file="pytorch_model.bin")
    assert "is a pickle" in told and "pytorch_model.safetensors or model.safetensors" in told


def test_of_a_model_the_files_that_are_read_are_wanted() -> None:
    found = chosen(AssetKind.BASE, DIFFUSERS + NEVER)
    never = {name for name in DIFFUSERS if name.endswith(".bin") or "fp16" in name}
    assert found == {name: name for name in DIFFUSERS if name not in never}


def test_components_without_the_variant_come_plain() -> None:
    found = chosen(AssetKind.BASE, DIFFUSERS + NEVER, variant="fp16")
    large = {name for name in found if name.endswith(".safetensors")}
    assert large == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_shards_belong_together() -> None:
    shards = [f"unet/diffusion_pytorch_model-0000{each}-of-00002.safetensors" for each in (1, 2)]
    assert chosen(AssetKind.UNET, ["unet/config.json", *shards]) == {
        name.removeprefix("unet/"): name for name in ["unet/config.json", *shards]
    }


@pytest.mark.parametrize(
    ("names", "variant", "words"),
    [
        (DIFFUSERS, "bf16", "variant 'bf16'; it has fp16"),
        ([name for name in DIFFUSERS if "vae/diff" not in name], None, "no safetensors file in vae"),
        (["a.safetensors", "b/c.safetensors"], None, "Name one of its files: ann/x/a.safetensors, ann/x/b/c"),
        (["a.ckpt", "unet/model.bin"], None, "It has pickles (.bin, .pt, .ckpt), which are not loaded."),
        (["README.md"], None, "It has no safetensors file."),
        (
            [name for name in DIFFUSERS if not name.endswith(".safetensors")],
            None,
            "no safetensors file in unet. It has pickles (.bin, .pt, .ckpt), which are not loaded.",
        ),
        (
            [name for name in DIFFUSERS if name != "unet/diffusion_pytorch_model.safetensors"],
            None,
            "no safetensors file in unet. It has the variant fp16.",
        ),
    ],
)
def test_what_is_no_whole_model_is_refused(names: list[str], variant: str | None, words: str) -> None:
    assert words in refusal(AssetKind.BASE, names, variant=variant)


def test_a_unet_lies_in_its_folder_or_at_the_top() -> None:
    weights = "diffusion_pytorch_model.safetensors"
    inside = chosen(AssetKind.UNET, DIFFUSERS)
    assert inside == {"config.json": "unet/config.json", weights: f"unet/{weights}"}
    assert chosen(AssetKind.UNET, ["config.json", weights]) == {
        "config.json": "config.json",
        weights: weights,
    }
    half = chosen(AssetKind.UNET, DIFFUSERS, variant="fp16")
    assert list(half) == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
    assert chosen(AssetKind.UNET, ["config.json", weights], variant="fp16") == {
        "config.json": "config.json",
        weights: weights,
    }
    told = refusal(AssetKind.UNET, ["sdxl_lightning_4step_unet.safetensors"])
    assert told.endswith("Name one of its files: ann/x/sdxl_lightning_4step_unet.safetensors.")
    assert "which are not loaded" in refusal(AssetKind.UNET, ["config.json", "diffusion_pytorch_model.bin"])
