"""Stable Diffusion 1.5, 2.1 and XL, and a ControlNet for XL: every component, tiny, with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_SEED = 1
_TEXT_WIDTH = 32
_SD2_TEXT_WIDTH = 48
_LATENT_SIDE = 8  # the usual picture has 64 pixels a side
_TIME_IDS, _TIME_WIDTH = 6, 8  # SDXL's sizes and crop, each a number and then so many
_START, _END, _PAD = "<|startoftext|>", "<|endoftext|>", "!"

# All three kinds' own values, some of them for other schedulers than the one that carries them.
_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}

Report = Callable[[str], None]


def build_sd15(folder: Path, report: Report) -> None:
    """Fill an empty folder with a pipeline that `StableDiffusionPipeline.from_pretrained` loads.

    The same bytes each time; torch's global random state is left as it was.
    """
    _save(_sd15, folder, report)


def build_sd2(folder: Path, report: Report) -> None:
    """As `build_sd15`, of the second version: it predicts velocities."""
    _save(_sd2, folder, report)


def build_sdxl(folder: Path, report: Report) -> None:
    """As `build_sd15`, for `StableDiffusionXLPipeline.from_pretrained`."""
    _save(_sdxl, folder, report)


def build_sdxl_canny(folder: Path, report: Report) -> None:
    """Fill an empty folder with a ControlNet for the embedded SDXL; the same bytes each time."""
    _save(_sdxl_canny, folder, report)


def _save(make: Callable[[Report], Any], folder: Path, report: Report) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        made = make(report)
    report("saving")
    made.save_pretrained(folder, safe_serialization=True)


def _sd15(report: Report) -> Any:
    report("building the text encoder")
    tokenizer = _tokenizer(_END)
    text_encoder = CLIPTextModel(_text_config(tokenizer, "quick_gelu"))
    report("building the autoencoder")
    vae = _autoencoder(0.18215)
    report("building the UNet")
    scheduler = PNDMScheduler.from_config(_SCHEDULE)
    return _pipeline(tokenizer, text_encoder, vae, _unet(**_SD15_UNET), scheduler)


def _sd2(report: Report) -> Any:
    report("building the text encoder")
    tokenizer = _tokenizer(_PAD)
    text_encoder = CLIPTextModel(_text_config(tokenizer, "gelu", width=_SD2_TEXT_WIDTH))
    report("building the autoencoder")
    vae = _autoencoder(0.18215)
    report("building the UNet")
    scheduler = DDIMScheduler.from_config(_SCHEDULE, prediction_type="v_prediction")
    return _pipeline(tokenizer, text_encoder, vae, _unet(**_SD2_UNET), scheduler)


def _pipeline(tokenizer: Any, text_encoder: Any, vae: Any, unet: Any, scheduler: Any) -> Any:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(report: Report) -> Any:
    report("building the text encoders")
    first, second = _tokenizer(_END), _tokenizer(_PAD)
    text_encoder = CLIPTextModel(_text_config(first, "quick_gelu"))
    text_encoder_2 = CLIPTextModelWithProjection(_text_config(second, "gelu"))
    report("building the autoencoder")
    vae = _autoencoder(0.13025)
    report("building the UNet")
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=first,
        tokenizer_2=second,
        unet=_unet(**_SDXL_UNET),
        scheduler=EulerDiscreteScheduler.from_config(_SCHEDULE, timestep_spacing="leading"),
        add_watermarker=False,
    )


def _sdxl_canny(report: Report) -> Any:
    report("building the ControlNet")
    net = ControlNetModel(**_SDXL_BLOCKS, **_NORMS, conditioning_embedding_out_channels=(4, 8, 8, 8))
    _speak_up(net)
    return net


def _tokenizer(pad: str) -> Any:
    """Byte-level, one token per character; the end token has the highest id, as CLIP's does, "!" is 0."""
    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [f"{letter}</w>" for letter in letters] + [_START, _END]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocabulary, merges=[], model_max_length=77, pad_token=pad)


def _text_config(tokenizer: Any, activation: str, width: int = _TEXT_WIDTH) -> Any:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        projection_dim=width,
        num_attention_heads=4,
        num_hidden_layers=3,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _autoencoder(scaling_factor: float) -> Any:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=scaling_factor,
    )


_NORMS = {"norm_num_groups": 4}
_CHANNELS = {"block_out_channels": (8, 16), "layers_per_block": 1}
_SD15_UNET = {
    **_CHANNELS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": _TEXT_WIDTH,
    "attention_head_dim": 2,
}
_SD2_UNET = {
    **_SD15_UNET,
    "cross_attention_dim": _SD2_TEXT_WIDTH,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
}
_SDXL_BLOCKS = {  # what its ControlNets repeat
    **_CHANNELS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 2 * _TEXT_WIDTH,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": _TIME_WIDTH,
    "projection_class_embeddings_input_dim": _TEXT_WIDTH + _TIME_IDS * _TIME_WIDTH,
}
_SDXL_UNET = {**_SDXL_BLOCKS, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}


def _unet(**config: Any) -> Any:
    unet = UNet2DConditionModel(**config, **_NORMS, sample_size=_LATENT_SIDE)
    _listen(unet)
    return unet


def _listen(unet: Any) -> None:
    """Make prompts matter to the eye: as drawn, another prompt moves a pixel by 5 to 20 of 255.

    The factor was found by looking; with it it is 19 to 44, and another seed's is 35 to 47.
    """
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                weight.mul_(5)


def _speak_up(net: Any) -> None:
    """Random values where a fresh ControlNet has zeros, so that it acts, and a hint that differs by picture.

    The spreads were found by looking: an edge picture moves a pixel by about 25 of 255.
    """
    hint = net.controlnet_cond_embedding
    with torch.no_grad():
        for layer in (hint.conv_in, *hint.blocks, hint.conv_out):
            layer.weight.normal_(std=2 / layer.weight[0].numel() ** 0.5)
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            layer.weight.normal_(std=0.3)
