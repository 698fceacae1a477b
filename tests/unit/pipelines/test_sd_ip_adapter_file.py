"""IP-Adapter files are read in every spelling that is published; what does not fit is refused by name."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from pipelines.sd.ip_adapter import IpAdapter, IpAdapterKind
from pipelines.sd.ip_adapter_file import MAX_LAYERS, load
from schemas.errors import AssetError
from tests.support import sd_controlnets, sd_ip_adapters
from tests.support.sd_ip_adapters import adapter, nested, seen, write

KINDS: tuple[IpAdapterKind, ...] = get_args(IpAdapterKind)
Tensors = dict[str, Tensor]

unet_of = cache(sd_ip_adapters.base)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a"  # as the cache of fetched files names them: without a suffix


def tokens(found: IpAdapter) -> Tensor:
    return found.tokens(*seen())


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_of_training_scripts_are_known(kind: IpAdapterKind, path: Path) -> None:
    given = adapter(kind, unet_of("sd1"))
    first = load(write(path, given), unet_of("sd1"))
    other = {
        key.replace("image_proj.", "image_proj_model.").replace("ip_adapter.", "adapter_modules."): each
        for key, each in given.items()
    }
    assert torch.equal(tokens(load(write(path, other), unet_of("sd1"))), tokens(first))


@pytest.mark.parametrize("kind", ["plus", "instantid", "faceid_plus"])
def test_a_resampler_may_be_named_as_diffusers_names_it(kind: IpAdapterKind, path: Path) -> None:
    given = adapter(kind, unet_of("sd1"))
    first = load(write(path, given), unet_of("sd1"))
    kept = {key: each for key, each in given.items() if not key.startswith("image_proj.")}
    prefix = "perceiver_resampler." if kind == "faceid_plus" else ""
    for name, each in first.projection.state_dict().items():
        if kind == "faceid_plus" and name.startswith(("proj.", "norm.")):
            continue
        kept[f"image_proj.{prefix}{name}"] = each
    kept |= {
        key: each for key, each in given.items() if key.startswith(("image_proj.proj.", "image_proj.norm."))
    }
    assert torch.equal(tokens(load(write(path, kept), unet_of("sd1"))), tokens(first))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_may_be_in_any_precision(stored: torch.dtype, path: Path) -> None:
    given = {key: each.to(stored) for key, each in adapter("faceid", unet_of("sd1")).items()}
    found = load(write(path, given), unet_of("sd1"))
    assert tokens(found).dtype == torch.float32
    assert found.lora is not None
    assert all(each.down.dtype.itemsize <= 4 for each in found.lora.layers.values())


def test_faceids_lora_has_every_attention_module(path: Path) -> None:
    unet = unet_of("sd1")
    given = adapter("faceid", unet)
    lora = load(write(path, given), unet).lora
    assert lora is not None
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    assert len(lora.layers) == 4 * len(names)
    for number, name in enumerate(names):
        for layer, ours in (("to_q", "to_q"), ("to_out", "to_out.0")):
            found = lora.layers[f"unet.{name}.{ours}"]
            assert torch.equal(found.down, given[f"ip_adapter.{number}.{layer}_lora.down.weight"])
            assert torch.equal(found.up, given[f"ip_adapter.{number}.{layer}_lora.up.weight"])


def test_a_lora_may_be_of_some_layers_only(path: Path) -> None:
    given = adapter("faceid", unet_of("sd1"))
    some = {key: each for key, each in given.items() if "_lora" not in key or ".0.to_q_lora" in key}
    lora = load(write(path, some), unet_of("sd1")).lora
    assert lora is not None and len(lora.layers) == 1


def test_the_file_may_go_away(path: Path) -> None:
    found = load(write(path, adapter("plus", unet_of("sd1"))), unet_of("sd1"))
    before = tokens(found)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tokens(found), before)


def test_the_unet_is_left_as_it_was(path: Path) -> None:
    unet = sd_ip_adapters.base("sd1")
    before = {name: each.clone() for name, each in unet.state_dict().items()}
    processors = {name: type(each) for name, each in unet.attn_processors.items()}
    load(write(path, adapter("faceid", unet)), unet)
    after = unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert {name: type(each) for name, each in unet.attn_processors.items()} == processors


def refusal(path: Path, tensors: Tensors, name: str = "sd1") -> str:
    with pytest.raises(AssetError) as caught:
        load(write(path, tensors), unet_of(name))
    assert caught.value.kind == "invalid_weights"
    return caught.value.message


def without(tensors: Tensors, *parts: str) -> Tensors:
    return {key: each for key, each in tensors.items() if not any(part in key for part in parts)}


def moved(tensors: Tensors, key: str, *shape: int) -> Tensors:
    return tensors | {key: torch.zeros(shape)}


Change = Callable[[Tensors], Tensors]
IMAGE, ADAPTER = "image_proj", "ip_adapter"
LAYER = f"{IMAGE}.layers"

# What is done to a file of a kind, and what is said of it.
BAD: list[tuple[IpAdapterKind, Change, str]] = [
    # parts are missing
    ("plain", lambda t: without(t, "ip_adapter"), "is not complete. It lacks ip_adapter.1.to_k_ip.weight"),
    ("plain", lambda t: without(t, "image_proj"), "is not complete. It lacks image_proj."),
    ("plain", lambda t: without(t, "3.to_v_ip"), "is not complete. It lacks ip_adapter.3.to_v_ip.weight."),
    ("plain", lambda t: without(t, ".1.to"), "5 cross-attention modules, up to number 11; this model has 6"),
    ("plain", lambda t: without(t, "norm"), "Its image_proj lacks norm.weight"),
    ("plain", lambda t: without(t, "norm.bias"), "Its image_proj lacks norm.bias."),
    ("plain", lambda t: without(t, "proj.weight"), "of no known kind. What it has is"),
    ("full", lambda t: without(t, "proj.0.weight"), "lacks ff.net.0.proj.weight"),
    ("full", lambda t: without(t, "proj.2.bias"), "lacks ff.net.2.bias."),
    ("plus", lambda t: without(t, "latents"), "of no known kind"),
    ("plus", lambda t: without(t, "layers.2"), "has no place for layers.3."),
    ("plus", lambda t: without(t, "layers"), "lacks layers.0.attn.to_q.weight"),
    ("plus", lambda t: without(t, "layers.1.0.to_kv"), "lacks layers.1.attn.to_k.weight, layers.1.attn.to_v"),
    ("faceid", lambda t: without(t, "proj.2"), "lacks ff.net.2.weight"),
    ("faceid_plus", lambda t: without(t, ".proj.0"), "lacks proj.net.0.proj.weight"),
    (
        "faceid",
        lambda t: without(t, ".0.to_q_lora.up"),
        "down without up, or the reverse: ip_adapter.0.to_q_lora",
    ),
    # there is more than there should be
    (
        "plain",
        lambda t: moved(t, "ip_adapter.13.to_k_ip.weight", 16, 24),
        "up to number 13; this model has 6",
    ),
    ("plain", lambda t: moved(t, "ip_adapter.1.to_k_ip.bias", 8), "no place for ip_adapter.1.to_k_ip.bias."),
    ("plain", lambda t: moved(t, "more.weight", 8), "no place for more.weight."),
    ("plain", lambda t: moved(t, "image_proj.more", 8), "image_proj has no place for more."),
    (
        "plain",
        lambda t: moved(t, "image_proj_model.norm.bias", 24),
        "twice: image_proj.norm.bias and image_proj_m",
    ),
    (
        "plus",
        lambda t: moved(t, f"{LAYER}.0.attn.to_q.weight", 128, 24),
        "layers.0.attn.to_q.weight under two",
    ),
    (
        "plus",
        lambda t: moved(t, f"{LAYER}.4.0.norm1.weight", 24),
        "is not complete. Its image_proj lacks layers.4.",
    ),
    (
        "faceid",
        lambda t: moved(t, f"{ADAPTER}.0.to_q_lora.alpha", 1),
        "no place for ip_adapter.0.to_q_lora.alpha",
    ),
    (
        "faceid",
        lambda t: t | {f"{ADAPTER}.99.to_q_lora.{side}.weight": torch.zeros(3, 8) for side in ("up", "down")},
        "made for another model: this one has no place for ip_adapter.99.to_q_lora.up.weight",
    ),
    # shapes
    (
        "plain",
        lambda t: moved(t, f"{IMAGE}.proj.weight", 97, 20),
        r"image_embeds.weight has the shape \[97, 20\]",
    ),
    ("plain", lambda t: moved(t, f"{IMAGE}.proj.weight", 3, 20), "does not fit together: "),
    ("plain", lambda t: moved(t, f"{IMAGE}.proj.weight", 96), r"image_embeds.weight has the shape \[96\]"),
    ("plain", lambda t: moved(t, f"{IMAGE}.norm.weight", 24, 1), r"norm.weight has the shape \[24, 1\]"),
    ("plain", lambda t: moved(t, f"{ADAPTER}.1.to_k_ip.weight", 8, 23), r"shape \[8, 23\] where \[8, 24\]"),
    ("plain", lambda t: moved(t, f"{ADAPTER}.1.to_v_ip.weight", 192), r"shape \[192\] where \[8, 24\]"),
    ("full", lambda t: moved(t, f"{IMAGE}.proj.0.weight", 27, 28), "does not fit together"),
    ("plus", lambda t: moved(t, f"{IMAGE}.latents", 5, 24), r"latents has the shape \[5, 24\]"),
    ("plus", lambda t: moved(t, f"{IMAGE}.latents", 2, 5, 24), r"\[2, 5, 24\] where \[1, 5, 24\]"),
    (
        "plus",
        lambda t: moved(t, f"{LAYER}.0.0.to_kv.weight", 255, 24),
        r"to_kv.weight has the shape \[255, 24\]",
    ),
    ("plus", lambda t: moved(t, f"{LAYER}.0.0.to_kv.weight", 256), r"to_kv.weight has the shape \[256\]"),
    ("plus", lambda t: moved(t, f"{LAYER}.0.0.to_q.weight", 130, 24), r"\[130, 24\] where \[128, 24\]"),
    ("plus", lambda t: moved(t, f"{LAYER}.0.0.to_q.weight", 3, 24), "does not fit together: "),
    ("plus", lambda t: moved(t, f"{LAYER}.0.1.1.weight", 48, 24), r"\[48, 24\] where \[96, 24\]"),
    ("faceid", lambda t: moved(t, f"{IMAGE}.proj.0.weight", 1024, 256), "reads faces 256 wide"),
    ("faceid", lambda t: moved(t, f"{IMAGE}.proj.0.weight", 100, 512), "does not fit together: "),
    ("faceid_plus", lambda t: moved(t, f"{IMAGE}.proj.0.weight", 1024, 256), "reads faces 256 wide"),
    ("faceid_plus", lambda t: moved(t, f"{IMAGE}.norm.weight", 25), r"\[25\] where \[24\]"),
    ("faceid", lambda t: moved(t, f"{ADAPTER}.0.to_q_lora.down.weight", 3, 9), r"\[3, 9\] where \[3, 8\]"),
    ("faceid", lambda t: moved(t, f"{ADAPTER}.0.to_q_lora.up.weight", 8, 4), r"\[8, 4\] where \[8, 3\]"),
    ("faceid", lambda t: moved(t, f"{ADAPTER}.0.to_q_lora.down.weight", 513, 8), "has rank 513; at most 512"),
    # values
    (
        "plain",
        lambda t: t | {f"{IMAGE}.proj.bias": torch.full((96,), torch.nan)},
        "not finite numbers, in image_pr",
    ),
    (
        "plain",
        lambda t: t | {f"{ADAPTER}.1.to_k_ip.weight": torch.full((8, 24), torch.inf)},
        "not finite numbers, in ip_adapter.1.to_k_ip.weight",
    ),
    (
        "faceid",
        lambda t: t | {f"{ADAPTER}.0.to_q_lora.up.weight": torch.full((8, 3), torch.nan)},
        "not finite numbers, in ip_adapter.0.to_q_lora.up.weight",
    ),
]


@pytest.mark.parametrize(("kind", "change", "fault"), BAD)
def test_what_does_not_fit_is_refused_by_name(
    kind: IpAdapterKind, change: Change, fault: str, path: Path
) -> None:
    message = refusal(path, change(adapter(kind, unet_of("sd1"))))
    assert re.search(fault, message), message


def test_every_key_of_a_projection_is_needed(path: Path) -> None:
    for kind in KINDS:
        given = adapter(kind, unet_of("sd1"), lora=False)
        for key in given:
            assert refusal(path, without(given, key)), key


def test_too_many_layers_are_refused(path: Path) -> None:
    given = adapter("plus", unet_of("sd1"))
    first = {key: each for key, each in given.items() if key.startswith(f"{LAYER}.0.")}
    for number in range(4, MAX_LAYERS + 1):
        given |= {key.replace("layers.0.", f"layers.{number}."): each.clone() for key, each in first.items()}
    assert f"has {MAX_LAYERS + 1} layers; at most {MAX_LAYERS} fit" in refusal(path, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("made_for", "used_on"), [("sdxl", "sd1"), ("sd1", "sdxl"), ("sd2", "sd1")])
def test_an_adapter_of_another_base_is_refused(
    kind: IpAdapterKind, made_for: str, used_on: str, path: Path
) -> None:
    message = refusal(path, adapter(kind, unet_of(made_for)), used_on)
    assert message.startswith("The IP-Adapter was made for another model: its tokens are ")


def test_the_real_bases_are_named(path: Path) -> None:
    """By the width of their text: only the numbers are large here."""
    real = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
    unets = {name: sd_controlnets.base(name, cross_attention_dim=width) for name, width in real.items()}
    write(path, adapter("plain", unets["sdxl"]))
    with pytest.raises(AssetError, match="was made for SDXL: .* Use one made for SD 1.x."):
        load(path, unets["sd1"])
    write(path, adapter("plain", unets["sd1"]))
    with pytest.raises(AssetError, match="was made for SD 1.x: .* Use one made for SDXL."):
        load(path, unets["sdxl"])


OTHERS: dict[str, tuple[list[str], str]] = {
    "kohya's LoRA": (
        ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
        "is a LoRA, not an IP-",
    ),
    "peft's LoRA": (
        ["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"],
        "is a LoRA, not an IP-Adapter.",
    ),
    "diffusers' old LoRA": (["down_blocks.0.attn1.processor.to_q_lora.down.weight"], "is a LoRA, not an IP-"),
    "FLUX": (
        [
            "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
            "ip_adapter_proj_model.norm.weight",
        ],
        "is an IP-Adapter for FLUX, not for SD.",
    ),
    "encoder": (["vision_model.pre_layrnorm.bias", "visual_projection.weight"], "is an image encoder"),
    "ControlNet": (["controlnet_cond_embedding.conv_in.weight", "conv_in.weight"], "is a ControlNet"),
    "T2I": (["adapter.body.0.resnets.0.block1.weight"], "is a T2I-Adapter"),
    "UNet": (["down_blocks.0.resnets.0.conv1.weight"], "holds a UNet; only an IP-Adapter is accepted."),
    "checkpoint": (["model.diffusion_model.out.0.weight"], "holds a UNet; only an IP-Adapter is accepted."),
    "unknown": (["a", "b"], "is not an IP-Adapter. What it has is a, b."),
    "FaceID's LoRA alone": (
        ["ip_adapter.0.to_q_lora.down.weight"],
        "is not an IP-Adapter. What it has is ip_",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused_by_what_they_are(name: str, path: Path) -> None:
    keys, fault = OTHERS[name]
    assert fault in refusal(path, {key: torch.zeros(2, 2) for key in keys})


def test_training_checkpoints_with_a_unet_are_refused(path: Path) -> None:
    given = adapter("plain", unet_of("sd1")) | {"unet.conv_in.weight": torch.zeros(2, 2)}
    assert "holds a UNet; only an IP-Adapter is accepted." in refusal(path, given)


def test_pickles_are_not_read(path: Path) -> None:
    torch.save(nested(adapter("plain", unet_of("sd1"))), path)
    with pytest.raises(AssetError, match="only safetensors files are accepted"):
        load(path, unet_of("sd1"))


def test_values_that_overflow_in_the_unets_dtype_are_refused(path: Path) -> None:
    unet: Any = sd_ip_adapters.base("sd1").half()
    given = adapter("plain", unet) | {"image_proj.proj.bias": torch.full((96,), 1e6)}
    write(path, given)
    with pytest.raises(AssetError, match="not finite numbers, in image_proj.proj.bias"):
        load(path, unet)
