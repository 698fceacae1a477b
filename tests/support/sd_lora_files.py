"""The spellings of Stable Diffusion LoRAs, for the writers of lora_files.

The names stand here a second time on purpose: they are what the files of others look like.
"""

import re
from collections.abc import Callable, Collection, Iterator

from tests.support.lora_files import Named, Spelling, own_names

Names = Callable[[Collection[str]], Iterator[Named]]

unet = own_names("unet")


def original_names(layers: Collection[str]) -> Iterator[Named]:
    """The UNet's layers as Stability AI's code names them.

    By the arithmetic of kohya's sd-scripts (library/sdxl_model_util.py, make_unet_conversion_map).
    """
    paths = [path for path, _ in unet(layers)]
    numbers = [int(number) for path in paths for number in re.findall(r"(?:resnets|attentions)\.(\d+)", path)]
    attending = {path.split(".")[1] for path in paths if re.match(r"up_blocks\.\d+\.attentions", path)}
    for path in paths:
        # a block on the way up has one resnet more than one on the way down
        yield _original(path, max(numbers, default=0) + 1, attending), (f"unet.{path}",)


_PLACE = {"resnets": 0, "attentions": 1}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _original(path: str, each: int, attending: Collection[str]) -> str:
    match path.split("."):
        case ["conv_in"]:
            return "input_blocks.0.0"
        case ["conv_out"]:
            return "out.2"
        case ["time_embedding" | "add_embedding" as embedding, layer]:
            stem = "time_embed" if embedding == "time_embedding" else "label_emb.0"
            return f"{stem}.{2 * (layer == 'linear_2')}"
        case ["down_blocks", block, "downsamplers", "0", "conv"]:
            return f"input_blocks.{each * (int(block) + 1)}.0.op"
        case ["up_blocks", block, "upsamplers", "0", "conv"]:
            return f"output_blocks.{each * (int(block) + 1) - 1}.{1 + (block in attending)}.conv"
        case ["mid_block", kind, number, *rest]:
            row = f"middle_block.{2 * int(number) + _PLACE[kind]}"
        case ["down_blocks", block, kind, number, *rest]:
            row = f"input_blocks.{each * int(block) + int(number) + 1}.{_PLACE[kind]}"
        case ["up_blocks", block, kind, number, *rest]:
            row = f"output_blocks.{each * int(block) + int(number)}.{_PLACE[kind]}"
        case _:
            raise AssertionError(f"{path} has no original name")
    layer = ".".join(rest)
    return f"{row}.{_RESNET.get(layer, layer)}"


def text_names(component: str, *, wrapped: bool = True) -> Names:
    """A text encoder's layers, below `text_model` or not, whatever the transformers in use does."""

    def names(layers: Collection[str]) -> Iterator[Named]:
        for path, parts in own_names(component)(layers):
            bare = path.removeprefix("text_model.")
            yield f"text_model.{bare}" if wrapped and bare.startswith("encoder.") else bare, parts

    return names


def processors(names: Names, end: str) -> Names:
    """Layers as diffusers named them until 2023: those of the attention by processor, others with an end."""
    ends = {f".to_{part}": f".processor.to_{part}_lora" for part in ("q", "k", "v")}
    ends |= {".to_out.0": ".processor.to_out_lora"}
    ends |= {f".{part}_proj": f".to_{part}_lora" for part in ("q", "k", "v", "out")}

    def old_names(layers: Collection[str]) -> Iterator[Named]:
        for name, parts in names(layers):
            own = next((own for own in ends if name.endswith(own)), "")
            yield name.removesuffix(own) + ends.get(own, end), parts

    return old_names


def ending(names: Names, end: str) -> Names:
    def longer_names(layers: Collection[str]) -> Iterator[Named]:
        yield from ((name + end, parts) for name, parts in names(layers))

    return longer_names


clip, clip_2 = text_names("text_encoder"), text_names("text_encoder_2")
_bare, _bare_2 = (text_names(each, wrapped=False) for each in ("text_encoder", "text_encoder_2"))

_PEFT = (".lora_A.weight", ".lora_B.weight")
_KOHYA = (".lora_down.weight", ".lora_up.weight")
_OLD = (".down.weight", ".up.weight")
_OWN = (("unet.", unet), ("text_encoder.", clip), ("text_encoder_2.", clip_2))
_OLD_ENDS = tuple(
    (prefix, names, ".lora" if names is unet else ".lora_linear_layer") for prefix, names in _OWN
)
_KOHYA_OWN = (("lora_unet.", unet), ("lora_te.", clip), ("lora_te2.", clip_2))
_COMFY = (
    ("diffusion_model.", original_names),
    ("text_encoders.clip_l.transformer.", clip),
    ("text_encoders.clip_g.transformer.", clip_2),
)

SPELLINGS = {
    "diffusers": Spelling(_OWN, _PEFT),
    "diffusers, text encoders without text_model": Spelling(
        (("unet.", unet), ("text_encoder.", _bare), ("text_encoder_2.", _bare_2)), _PEFT
    ),
    "diffusers, alpha in the notes": Spelling((("unet.", unet),), _PEFT, alpha="notes"),
    "diffusers, the UNet alone": Spelling((("", unet),), _PEFT),
    "diffusers, kohya's suffixes": Spelling(_OWN, _KOHYA, alpha="keys"),
    "diffusers until 2023, processors": Spelling(
        tuple((prefix, processors(names, end)) for prefix, names, end in _OLD_ENDS), _OLD
    ),
    "diffusers until 2023, layers": Spelling(
        tuple((prefix, ending(names, end)) for prefix, names, end in _OLD_ENDS), _OLD
    ),
    "peft": Spelling((("base_model.model.", unet),), (".lora_A.default.weight", ".lora_B.default.weight")),
    "kohya": Spelling(_KOHYA_OWN, _KOHYA, flat=True, alpha="keys"),
    "kohya, original names": Spelling(
        (("lora_unet.", original_names), ("lora_te1.", clip), ("lora_te2.", clip_2)),
        _KOHYA,
        flat=True,
        alpha="keys",
    ),
    "kohya, matrices as kernels": Spelling(_KOHYA_OWN, _KOHYA, flat=True, alpha="keys", convolutions=True),
    "kohya, kernels as matrices": Spelling(_KOHYA_OWN, _KOHYA, flat=True, alpha="keys", matrices=True),
    "kohya, without alpha": Spelling(_KOHYA_OWN, _KOHYA, flat=True),
    "LyCORIS": Spelling((("lycoris.", unet),), _KOHYA, flat=True, alpha="keys"),
    "ComfyUI": Spelling(_COMFY, _PEFT),
    "ComfyUI, kohya's suffixes": Spelling(_COMFY, _KOHYA, alpha="keys"),
    "original": Spelling((("", original_names),), _PEFT),
}
