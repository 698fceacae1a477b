"""Which Stable Diffusion a model is, and whether it is one that we can run, by its UNet's config."""

from collections.abc import Collection, Mapping
from typing import Any

from pipelines.adapters.tensor_file import invalid, listed
from pipelines.sd.parts import Kind

Config = Mapping[str, Any]

# Of the real UNets: the first count of channels, which models made small for tests do not have, and the
# width of the text they read.
_FULL_SIZE = 320
_TEXT_WIDTHS: Mapping[Kind, int] = {"sd1": 768, "sd2": 1024, "sdxl": 2048}

_INPUTS = {
    3: "a model of pixels, not of latents",
    5: "a model guided by depth",
    7: "an upscaler",
    8: "an InstructPix2Pix model",
    9: "an inpainting model",
}
# What UNets of other pipelines have, and ours do not.
_FOREIGN = {
    "encoder_hid_dim_type": "a UNet with a projection of its text, such as Kandinsky's",
    "encoder_hid_dim": "a UNet with a projection of its text, such as DeepFloyd's",
    "class_embed_type": "a UNet with classes, such as unCLIP's",
    "num_class_embeds": "a UNet with classes, such as the upscaler's",
    "time_cond_proj_dim": "a UNet that reads the guidance scale, as Latent Consistency Models do",
}


def kind_of(unet: Config) -> Kind:
    """The kind of a model with this UNet.

    SDXL's reads sizes and a pooled text beside the tokens (`addition_embed_type`); SD2's differs from SD1's
    by its linear projections. That holds at any size. At the real one the width of the text has the last
    word (768, 1024, 2048): some SD1 models were saved with linear projections. Raises AssetError naming what
    the model is instead.
    """
    _check_loop(unet)
    channels, width = unet.get("block_out_channels"), unet.get("cross_attention_dim")
    reads_sizes = unet.get("addition_embed_type") == "text_time"
    kind: Kind = "sdxl" if reads_sizes else "sd2" if unet.get("use_linear_projection") else "sd1"
    if isinstance(channels, list) and channels[:1] == [_FULL_SIZE]:
        if not reads_sizes and width == _TEXT_WIDTHS["sd1"]:
            return "sd1"
        if not reads_sizes and width == _TEXT_WIDTHS["sd2"]:
            return "sd2"
        if width != _TEXT_WIDTHS[kind]:
            raise refused(f"one whose UNet reads texts of width {str(width)[:20]}")
    return kind


def check_encoders(kind: Kind, text_encoders: Collection[str]) -> None:
    """Raise AssetError unless a model has the text encoders of its kind; given are their folders' names."""
    expected = ("text_encoder", "text_encoder_2") if kind == "sdxl" else ("text_encoder",)
    if kind == "sdxl" and set(text_encoders) == {"text_encoder_2"}:
        raise refused("SDXL's refiner")
    if set(text_encoders) != set(expected):
        has = f"has {listed(text_encoders)}" if text_encoders else "has none"
        raise invalid(f"A model with this UNet needs {listed(expected)}; this one {has}.")


def _check_loop(unet: Config) -> None:
    """Raise AssetError for a UNet that Stable Diffusion's loop does not drive."""
    if unet.get("_class_name") != "UNet2DConditionModel":
        name = str(unet.get("_class_name"))[:80]
        raise invalid(f"The model's UNet is a {name}, not a UNet2DConditionModel.")
    check_input(unet.get("in_channels", 4))
    for key, what in _FOREIGN.items():
        if unet.get(key) is not None:
            raise refused(what)
    if unet.get("addition_embed_type") not in (None, "text_time"):
        raise refused(f"a UNet that reads {str(unet['addition_embed_type'])[:40]}, as Kandinsky's does")
    if unet.get("out_channels", 4) != 4:
        raise refused(f"one with {str(unet['out_channels'])[:20]} output channels")


def check_input(channels: object) -> None:
    """Raise AssetError for a UNet that reads more or less than latents."""
    if channels != 4:
        what = _INPUTS.get(channels) if isinstance(channels, int) else None
        raise refused(what or f"one with {str(channels)[:20]} input channels")


def refused(what: str) -> Exception:
    return invalid(f"The model is {what}; only base models of Stable Diffusion 1, 2 and XL are supported.")
