"""The IP-Adapters that are published, by their names and shapes, on UNets of full size without values."""

from functools import cache
from typing import Any

import pytest
import torch

from pipelines.sd.image_attention import ImageAttention, ImagePrompt
from pipelines.sd.ip_adapter import IpAdapter, IpAdapterKind, Reads
from pipelines.sd.ip_adapter_file import architecture
from schemas.errors import AssetError
from tests.support import sd_controlnets, sd_ip_adapters
from tests.support.sd_ip_adapters import Sizes, predict

unet_of = cache(sd_controlnets.full_size_base)

_H = {"embedding": 1024, "hidden": 1280}
_BIG_G = {"embedding": 1280, "hidden": 1664}
# h94/IP-Adapter, h94/IP-Adapter-FaceID and InstantX/InstantID: base, kind, sizes, and what it reads.
PUBLISHED: dict[str, tuple[str, IpAdapterKind, Sizes, Reads]] = {
    "ip-adapter_sd15": ("SD 1.5", "plain", Sizes(**_H), Reads(embedding=1024)),
    "ip-adapter-full-face_sd15": ("SD 1.5", "full", Sizes(**_H), Reads(hidden=1280)),
    "ip-adapter-plus_sd15": (
        "SD 1.5", "plus", Sizes(**_H, inner=768, heads=12, queries=16), Reads(hidden=1280),
    ),
    "ip-adapter-faceid_sd15": ("SD 1.5", "faceid", Sizes(), Reads(face=512)),
    "ip-adapter-faceid-portrait_sd15": ("SD 1.5", "faceid", Sizes(tokens=16), Reads(face=512)),
    "ip-adapter-faceid-plusv2_sd15": (
        "SD 1.5", "faceid_plus", Sizes(**_H, heads=12), Reads(hidden=1280, face=512),
    ),
    "ip-adapter_sdxl": ("SDXL", "plain", Sizes(**_BIG_G), Reads(embedding=1280)),
    "ip-adapter_sdxl_vit-h": ("SDXL", "plain", Sizes(**_H), Reads(embedding=1024)),
    "ip-adapter-plus_sdxl_vit-h": (
        "SDXL", "plus", Sizes(**_H, inner=1280, heads=20, queries=16), Reads(hidden=1280),
    ),
    "ip-adapter-faceid_sdxl": ("SDXL", "faceid", Sizes(), Reads(face=512)),
    "ip-adapter-faceid-plusv2_sdxl": (
        "SDXL", "faceid_plus", Sizes(**_H, heads=32), Reads(hidden=1280, face=512),
    ),
    "InstantID": (
        "SDXL", "instantid", Sizes(inner=1280, heads=20, queries=16), Reads(face=512, normed_face=False),
    ),
}  # fmt: skip

# By hand: how many cross-attention modules there are, and some of the tensors.
MODULES = {"SD 1.5": 16, "SDXL": 70}
TENSORS: dict[str, sd_ip_adapters.Shapes] = {
    "ip-adapter_sd15": {
        "image_proj.proj.weight": (3072, 1024),
        "image_proj.norm.weight": (768,),
        "ip_adapter.1.to_k_ip.weight": (320, 768),
        "ip_adapter.11.to_v_ip.weight": (1280, 768),
        "ip_adapter.31.to_v_ip.weight": (1280, 768),
    },
    "ip-adapter-full-face_sd15": {
        "image_proj.proj.0.weight": (1280, 1280),
        "image_proj.proj.2.weight": (768, 1280),
        "image_proj.proj.3.weight": (768,),
    },
    "ip-adapter-plus_sd15": {
        "image_proj.latents": (1, 16, 768),
        "image_proj.proj_in.weight": (768, 1280),
        "image_proj.layers.3.0.to_kv.weight": (1536, 768),
        "image_proj.layers.3.1.1.weight": (3072, 768),
    },
    "ip-adapter-faceid_sd15": {
        "image_proj.proj.0.weight": (1024, 512),
        "image_proj.proj.2.weight": (3072, 1024),
        "ip_adapter.0.to_q_lora.down.weight": (3, 320),
        "ip_adapter.31.to_k_lora.down.weight": (3, 768),
    },
    "ip-adapter-faceid-plusv2_sd15": {
        "image_proj.perceiver_resampler.proj_in.weight": (768, 1280),
        "image_proj.perceiver_resampler.layers.0.0.to_q.weight": (768, 768),
    },
    "ip-adapter_sdxl_vit-h": {
        "image_proj.proj.weight": (8192, 1024),
        "ip_adapter.1.to_k_ip.weight": (640, 2048),
        "ip_adapter.139.to_v_ip.weight": (1280, 2048),
    },
    "InstantID": {
        "image_proj.latents": (1, 16, 1280),
        "image_proj.proj_in.weight": (1280, 512),
        "image_proj.proj_out.weight": (2048, 1280),
        "image_proj.layers.0.0.to_q.weight": (1280, 1280),
    },
}


def shapes_of(name: str) -> sd_ip_adapters.Shapes:
    base, kind, sizes, _ = PUBLISHED[name]
    return sd_ip_adapters.shapes(kind, unet_of(base), sizes)


@pytest.mark.parametrize("name", TENSORS)
def test_the_tensors_are_those_of_the_published(name: str) -> None:
    shapes = shapes_of(name)
    assert {key: shapes.get(key) for key in TENSORS[name]} == TENSORS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_tell_what_a_file_is(name: str) -> None:
    base, kind, _, reads = PUBLISHED[name]
    found = architecture(shapes_of(name), unet_of(base))
    assert (found.kind, found.reads, len(found.pairs)) == (kind, reads, MODULES[base])
    assert len(found.loras) == (8 * MODULES[base] if kind.startswith("faceid") else 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_on_another_base_they_are_refused(name: str) -> None:
    base = PUBLISHED[name][0]
    made_for, other = ("SD 1.x", "SDXL") if base == "SD 1.5" else ("SDXL", "SD 1.x")
    wrong = "SDXL" if other == "SDXL" else "SD 1.5"
    with pytest.raises(AssetError, match=f"was made for {made_for}: .* Use one made for {other}."):
        architecture(shapes_of(name), unet_of(wrong))


@pytest.mark.parametrize("name", ["ip-adapter-plus_sd15", "InstantID"])
@torch.inference_mode()
def test_a_forward_goes_through_in_its_shapes(name: str) -> None:
    """A row with a mask, one with two adapters, one without any."""
    base, kind, _, reads = PUBLISHED[name]
    with torch.device("meta"):
        unet: Any = sd_controlnets.full_size_base(base)
        plan = architecture(shapes_of(name), unet)
        weights = tuple(
            (torch.empty(shapes_of(name)[key]), torch.empty(shapes_of(name)[value]))
            for key, value in plan.pairs
        )
        found = IpAdapter(kind, reads, None, plan.module, weights)
        prompt = ImagePrompt(
            found.pairs(torch.empty(16, unet.config.cross_attention_dim)), (1.0,) * len(weights)
        )
        masked = ImagePrompt(prompt.pairs, prompt.scales, torch.empty(1, 128, 96))
        attention = ImageAttention(unet)
        inputs = {
            "sample": torch.empty(3, 4, 128, 96),
            "timestep": torch.empty(3),
            "encoder_hidden_states": torch.empty(3, 77, unet.config.cross_attention_dim),
            "added_cond_kwargs": {"text_embeds": torch.empty(3, 1280), "time_ids": torch.empty(3, 6)},
        }
        with attention.rows([[masked], [prompt, prompt], []], (128, 96)):
            assert predict(unet, inputs).shape == (3, 4, 128, 96)
