"""The names that FLUX LoRAs, and requests about them, give to layers and norms.

Trainers name a layer as diffusers does or as Black Forest Labs' own code does
(https://github.com/black-forest-labs/flux, model.py), with one of several prefixes, with dots or with
underscores for dots.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch.nn import Linear, RMSNorm

from pipelines.adapters import lora_names
from pipelines.adapters.lora import Destination, Shapes, Translate
from pipelines.adapters.lora_names import Named, Prefixes, with_or_without

NormSizes = Mapping[str, int]

# What control LoRAs widen: it reads the latents' tokens, and beside them the control image's.
WIDE = "transformer.x_embedder"

# The original's layers inside a block, and the diffusers layers whose rows they stack. The names with
# "processor" are XLabs': 1 is the image's side, 2 the text's.
_DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "processor.qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "processor.proj_lora2": ("attn.to_add_out",),
}
_SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "processor.qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "processor.proj_lora": ("proj_out",),
}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
# The original's norms inside a block.
_DOUBLE_BLOCK_NORMS = {
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
_SINGLE_BLOCK_NORMS = {
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_HALVES_SWAPPED = "final_layer.adaLN_modulation.1"  # shift then scale there, scale then shift in diffusers

_PREFIXES = {
    "transformer": Prefixes(
        ("", "transformer.", "diffusion_model."),
        ("lora_unet_", "lora_transformer_", "lycoris_"),
    ),
    "text_encoder": Prefixes(
        ("text_encoder.", "text_encoders.clip_l.transformer."),
        ("lora_te_", "lora_te1_"),
    ),
    "text_encoder_2": Prefixes(
        ("text_encoder_2.", "text_encoders.t5xxl.transformer."),
        ("lora_te2_", "lora_te3_"),  # sd-scripts counts T5 as the third encoder
    ),
}


def targets(transformer: Any, text_encoder: Any, text_encoder_2: Any) -> Shapes:
    """Every layer that may carry a LoRA, "component.path", with its weight's (out, in)."""
    components = {
        "transformer": transformer,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    return {
        f"{component}.{path}": (module.out_features, module.in_features)
        for component, model in components.items()
        for path, module in model.named_modules()
        if isinstance(module, Linear)
    }


def norms(transformer: Any) -> NormSizes:
    """Every norm whose weight a control LoRA may replace, "transformer.path", with the weight's size."""
    return {
        f"transformer.{path}": module.normalized_shape[0]
        for path, module in transformer.named_modules()
        if isinstance(module, RMSNorm) and module.weight is not None
    }


def translator(targets: Shapes, norms: NormSizes = MappingProxyType({})) -> Translate:
    """The translator for a model with these targets and norms."""
    return lora_names.translator(lora_names.spellings([*targets, *norms], _PREFIXES, _names))


def layer_scales(wish: Mapping[str, float], targets: Shapes) -> Mapping[str, float]:
    """The scale of each target that a request's map of names to scales sets; see lora_names."""
    return lora_names.layer_scales(wish, lora_names.spellings(targets, _PREFIXES, _names))


def _names(component: str, paths: list[str]) -> Iterator[Named]:
    """A component's layers by all their names, without prefixes."""
    for path in paths:
        yield path, Destination((f"{component}.{path}",))
    if component == "transformer":
        for name, parts in _original_names(paths):
            yield name, Destination(tuple(f"transformer.{part}" for part in parts), name == _HALVES_SWAPPED)
    if component == "text_encoder":
        for path in paths:  # transformers 5.6 dropped the wrapper; files have either
            yield with_or_without("text_model", path), Destination((f"text_encoder.{path}",))


def _original_names(paths: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    known = set(paths)
    blocks = (
        ("transformer_blocks", "double_blocks", _DOUBLE_BLOCK | _DOUBLE_BLOCK_NORMS),
        ("single_transformer_blocks", "single_blocks", _SINGLE_BLOCK | _SINGLE_BLOCK_NORMS),
    )
    for name, path in _OUTSIDE.items():
        if path in known:  # some checkpoints have no guidance
            yield name, (path,)
    for ours, theirs, layers in blocks:
        numbers = {path.split(".")[1] for path in paths if path.startswith(f"{ours}.")}
        for number in numbers:
            for name, parts in layers.items():
                places = tuple(f"{ours}.{number}.{part}" for part in parts)
                if known.issuperset(places):
                    yield f"{theirs}.{number}.{name}", places
