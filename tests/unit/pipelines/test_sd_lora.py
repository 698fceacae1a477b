"""Stable Diffusion LoRAs: every spelling loads to the same layers, and acts as under diffusers."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipelines import zoo
from pipelines.adapters import lora
from pipelines.adapters.bank import LoraBank, LoraUse
from pipelines.adapters.lora import Lora, LoraLayer
from pipelines.adapters.lora_names import beginnings
from pipelines.sd import lora_keys
from pipelines.sd.lora_keys import layer_scales
from schemas.errors import AssetError
from tests.support import lora_files
from tests.support.lora_files import RANK, Shapes
from tests.support.sd_lora_files import SPELLINGS

PIPELINES: dict[str, Any] = {
    "sd15": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}


@dataclass(frozen=True)
class Tiny:
    """An embedded model as diffusers loads it."""

    pipeline: Any
    shapes: Shapes

    @classmethod
    def of(cls, pipeline: Any) -> "Tiny":
        encoders = [pipeline.text_encoder]
        if hasattr(pipeline, "text_encoder_2"):
            encoders.append(pipeline.text_encoder_2)
        return cls(pipeline, lora_keys.targets(pipeline.unet, encoders))

    def copy(self) -> "Tiny":
        return Tiny(copy.deepcopy(self.pipeline), self.shapes)

    def load(self, path: Path) -> Lora:
        return load(path, self.shapes)

    def modules(self) -> dict[str, Any]:
        """The layers that may carry a LoRA."""
        paths = {name: name.partition(".") for name in self.shapes}
        components = self.pipeline.components
        return {name: components[part].get_submodule(path) for name, (part, _, path) in paths.items()}

    def bank(self) -> LoraBank:
        return LoraBank(self.modules(), rank=16)

    @torch.inference_mode()
    def answer(self, rows: int = 1) -> Tensor:
        """The UNet's prediction for some latents, another in each row."""
        generator = torch.Generator("cpu").manual_seed(5)
        unet = self.pipeline.unet
        sizes = {"text_embeds": [rows, 32], "time_ids": [rows, 6]}
        added = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        prediction: Tensor = unet(
            torch.randn(rows, 4, 16, 16, generator=generator),
            torch.arange(rows) * 100 + 1,
            torch.randn(rows, 7, unet.config.cross_attention_dim, generator=generator),
            added_cond_kwargs=added if unet.config.addition_embed_type else None,
            return_dict=False,
        )[0]
        return prediction

    @torch.inference_mode()
    def texts(self) -> list[Tensor]:
        """What the text encoders say, layer by layer, and pooled."""
        encoders = [each for name, each in self.pipeline.components.items() if "text_encoder" in name]
        answers = [each(torch.tensor([[0, 5, 9, 1]]), output_hidden_states=True) for each in encoders]
        return [tensor for each in answers for tensor in (each[0], *each.hidden_states)]


def load(path: Path, shapes: Shapes) -> Lora:
    return lora.load(path, lora_keys.translator(shapes), shapes)


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tiny]:
    root = tmp_path_factory.mktemp("zoo")
    return {
        kind: Tiny.of(pipeline.from_pretrained(zoo.locate(kind, root)))
        for kind, pipeline in PIPELINES.items()
    }


@pytest.fixture(params=PIPELINES)
def tiny(request: pytest.FixtureRequest, tinies: Mapping[str, Tiny]) -> Tiny:
    return tinies[request.param]


@dataclass(frozen=True)
class FullSize:
    """A published model's sizes, without weights."""

    unet: Any
    shapes: Shapes


@pytest.fixture(scope="module")
def full_sizes() -> Mapping[str, FullSize]:
    with torch.device("meta"):
        clip_l, clip_h = text_encoder(768, 12), text_encoder(1024, 23)
        clip_g = text_encoder(1280, 32, CLIPTextModelWithProjection)
        models = {
            "sd15": (sd_unet(768), [clip_l]),
            "sd2": (sd_unet(1024, use_linear_projection=True), [clip_h]),
            "sdxl": (sdxl_unet(), [clip_l, clip_g]),
        }
    return {
        kind: FullSize(unet, lora_keys.targets(unet, encoders)) for kind, (unet, encoders) in models.items()
    }


@pytest.fixture(params=["sd15", "sd2", "sdxl"])
def full_size(request: pytest.FixtureRequest, full_sizes: Mapping[str, FullSize]) -> FullSize:
    return full_sizes[request.param]


def text_encoder(width: int, layers: int, kind: Callable[..., Any] = CLIPTextModel) -> Any:
    return kind(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            projection_dim=width,
        )
    )


def sd_unet(text_width: int, **others: Any) -> Any:
    return UNet2DConditionModel(cross_attention_dim=text_width, **others)  # diffusers' defaults are SD 1's


def sdxl_unet() -> Any:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def equal(ours: LoraLayer, theirs: LoraLayer) -> bool:
    if ours.bias is None or theirs.bias is None:
        biases = ours.bias is theirs.bias
    else:
        biases = torch.equal(ours.bias, theirs.bias)
    return biases and torch.equal(ours.down, theirs.down) and torch.equal(ours.up, theirs.up)


def parts_of(spelling: str, drawn: Mapping[str, LoraLayer]) -> set[str]:
    """The layers that such a file has."""
    return {part for parts in lora_files.named(SPELLINGS[spelling], drawn).values() for part in parts}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads_to_the_same_layers(
    spelling: str, biased: bool, tiny: Tiny, tmp_path: Path
) -> None:
    drawn = lora_files.draw(tiny.shapes, biased=biased)
    path = lora_files.write(tmp_path / "a", SPELLINGS[spelling], drawn)

    layers = tiny.load(path).layers

    expected = lora_files.folded(drawn)
    assert layers.keys() == parts_of(spelling, drawn)
    assert [name for name, layer in layers.items() if not equal(layer, expected[name])] == []
    assert all(layer.down.shape[1:] == tiny.shapes[name][1:] for name, layer in layers.items())


def test_the_spellings_cover_every_layer(tiny: Tiny) -> None:
    for spelling in ("diffusers", "diffusers until 2023, processors", "kohya, original names", "ComfyUI"):
        assert parts_of(spelling, lora_files.draw(tiny.shapes)) == tiny.shapes.keys()


@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "kohya, original names", "ComfyUI"])
def test_a_file_for_the_full_size_model_has_nothing_left_over(
    spelling: str, full_size: FullSize, tmp_path: Path
) -> None:
    drawn = lora_files.draw(full_size.shapes, rank=1, dtype=torch.bfloat16)
    path = lora_files.write(tmp_path / "a", SPELLINGS[spelling], drawn)

    layers = load(path, full_size.shapes).layers

    assert layers.keys() == full_size.shapes.keys()
    for name, layer in layers.items():
        assert (len(layer.up), *layer.down.shape[1:]) == full_size.shapes[name]


@pytest.mark.parametrize(
    ("kind", "spelling", "counts"),
    [
        # 16 attentions of 10 layers in the one block, and 2 around it; 12 text layers of 6
        ("sd15", "kohya", {"unet": 192, "text_encoder": 72}),
        ("sd2", "kohya", {"unet": 192, "text_encoder": 138}),
        # 11 attentions with 70 blocks in all; 12 and 32 text layers
        ("sdxl", "kohya, original names", {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}),
    ],
)
def test_what_kohya_trains_by_default_is_known_at_full_size(
    kind: str, spelling: str, counts: dict[str, int], full_sizes: Mapping[str, FullSize]
) -> None:
    shapes = full_sizes[kind].shapes
    translate = lora_keys.translator(shapes)
    drawn = lora_files.draw(shapes, rank=1)
    trained = {
        name: parts
        for name, parts in lora_files.named(SPELLINGS[spelling], drawn).items()
        if ".attentions." in parts[0] or ".layers." in parts[0]
    }
    found = {destination.targets for name in trained if (destination := translate(name))}
    assert found == set(trained.values())
    assert {part: sum(each.startswith(f"{part}.") for (each,) in found) for part in counts} == counts
    assert len(found) == sum(counts.values())


# Names as files of others have them.
KNOWN = {
    "sd15": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj": (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
        ),
        "lora_unet_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
        "lora_te_text_model_encoder_layers_11_mlp_fc2": "text_encoder.encoder.layers.11.mlp.fc2",
        "diffusion_model.output_blocks.2.1.conv": "unet.up_blocks.0.upsamplers.0.conv",
        "diffusion_model.output_blocks.11.1.proj_out": "unet.up_blocks.3.attentions.2.proj_out",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_out.0": (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
        ),
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_out_lora": (
            "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
        ),
    },
    "sd2": {
        "text_encoders.clip_h.transformer.text_model.encoder.layers.22.mlp.fc1": (
            "text_encoder.encoder.layers.22.mlp.fc1"
        ),
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2": (
            "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.2"
        ),
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0": (
            "unet.up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0"
        ),
        "lora_unet_output_blocks_5_2_conv": "unet.up_blocks.1.upsamplers.0.conv",
        "lora_unet_input_blocks_6_0_op": "unet.down_blocks.1.downsamplers.0.conv",
        "lora_unet_input_blocks_7_0_skip_connection": "unet.down_blocks.2.resnets.0.conv_shortcut",
        "lora_unet_middle_block_2_in_layers_2": "unet.mid_block.resnets.1.conv1",
        "lora_unet_output_blocks_8_0_out_layers_3": "unet.up_blocks.2.resnets.2.conv2",
        "lora_unet_output_blocks_0_0_emb_layers_1": "unet.up_blocks.0.resnets.0.time_emb_proj",
        "lora_unet_label_emb_0_2": "unet.add_embedding.linear_2",
        "lora_unet_time_embed_0": "unet.time_embedding.linear_1",
        "lora_unet_out_2": "unet.conv_out",
        "lora_te1_text_model_encoder_layers_11_self_attn_k_proj": (
            "text_encoder.encoder.layers.11.self_attn.k_proj"
        ),
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj": (
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj"
        ),
        "lora_te2_text_projection": "text_encoder_2.text_projection",
    },
}


@pytest.mark.parametrize("kind", KNOWN)
def test_names_from_the_wild_reach_their_layers(kind: str, full_sizes: Mapping[str, FullSize]) -> None:
    translate = lora_keys.translator(full_sizes[kind].shapes)
    for name, layer in KNOWN[kind].items():
        destination = translate(name)
        assert destination is not None, name
        assert [target.replace(".text_model.", ".") for target in destination.targets] == [
            layer.replace(".text_model.", ".")
        ]


def test_original_names_are_those_that_diffusers_converts(full_size: FullSize) -> None:
    """Its conversion of whole checkpoints, every layer of the UNet."""
    named = lora_files.named(SPELLINGS["original"], lora_files.draw(full_size.shapes, rank=1))
    checkpoint = {
        f"model.diffusion_model.{name}.{part}": torch.tensor(number)
        for number, name in enumerate(named)
        for part in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, full_size.unet.config)
    theirs = {key: int(value) for key, value in converted.items() if key.endswith(".weight")}

    translate = lora_keys.translator(full_size.shapes)
    ours = {}
    for number, name in enumerate(named):
        destination = translate(name)
        assert destination is not None
        ours[destination.targets[0].removeprefix("unet.") + ".weight"] = number
    assert ours == theirs
    assert len(ours) == sum(name.startswith("unet.") for name in full_size.shapes)


@pytest.mark.parametrize(
    ("kind", "spelling", "lost"),
    [
        ("sd15", "kohya", ()),
        ("sdxl", "kohya", ("unet.add_embedding",)),  # diffusers 0.42 makes add.embedding.linear of both
        ("sdxl", "kohya, original names", ()),
    ],
)
def test_a_file_that_diffusers_converts_is_the_same_lora_to_us(
    kind: str, spelling: str, lost: tuple[str, ...], full_sizes: Mapping[str, FullSize], tmp_path: Path
) -> None:
    """diffusers makes its names of before 2023 out of kohya's, and we read those as well."""
    full_size = full_sizes[kind]
    shapes = {name: shape for name, shape in full_size.shapes.items() if not name.startswith(lost)}
    drawn = lora_files.draw(shapes, rank=int(lora_files.ALPHA))  # so that alpha changes nothing
    path = lora_files.write(tmp_path / "a.safetensors", SPELLINGS[spelling], drawn)
    converted, _ = PIPELINES[kind].lora_state_dict(
        str(tmp_path), weight_name=path.name, unet_config=full_size.unet.config, local_files_only=True
    )
    save_file(converted, tmp_path / "b")

    ours, theirs = load(path, full_size.shapes).layers, load(tmp_path / "b", full_size.shapes).layers

    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not equal(ours[name], theirs[name])] == []


# What diffusers loads into a model of any size: the original's names for SDXL only.
LOADED = {
    "sd15": ["diffusers", "diffusers, alpha in the notes", "diffusers until 2023, processors", "kohya"],
    "sd2": ["diffusers", "kohya"],
    "sdxl": ["diffusers", "diffusers until 2023, processors", "kohya, original names"],
}


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize(
    ("kind", "spelling"), [(kind, spelling) for kind, spellings in LOADED.items() for spelling in spellings]
)
def test_the_model_answers_as_under_diffusers_own_loader(
    kind: str, spelling: str, convolutions: bool, tinies: Mapping[str, Tiny], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    ours, theirs = tinies[kind].copy(), tinies[kind].copy()
    drawn = draw(ours, convolutions)
    path = lora_files.write(tmp_path / "a.safetensors", SPELLINGS[spelling], drawn)
    plain, plain_texts = ours.answer(), ours.texts()

    theirs.pipeline.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="a")
    theirs.pipeline.set_adapters(["a"], [0.7])
    bank = ours.bank()
    bank.hold({"a": ours.load(path)})
    with bank.rows([[LoraUse("a", 0.7)]]):
        answer, texts = ours.answer(), ours.texts()

    assert (answer - plain).abs().max() > 0.01
    torch.testing.assert_close(answer, theirs.answer(), atol=1e-5, rtol=1e-5)
    for our, their in zip(texts, theirs.texts(), strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)
    with_texts = any(name.startswith("text") for name in parts_of(spelling, drawn))
    assert with_texts == ((texts[0] - plain_texts[0]).abs().max() > 0.01)
    assert torch.equal(ours.answer(), plain)


def draw(tiny: Tiny, convolutions: bool = True, seed: int = 11, rank: int = RANK) -> dict[str, LoraLayer]:
    """A LoRA on kohya's layers, and on LoCon's on top."""
    shapes = {
        name: shape
        for name, shape in tiny.shapes.items()
        if convolutions or ".attentions." in name or ".layers." in name
    }
    return dampened(lora_files.draw(shapes, rank, seed=seed))


def dampened(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Of a strength that leaves the answers near 1."""
    return {name: LoraLayer(layer.down / 16, layer.up, layer.bias) for name, layer in layers.items()}


def test_a_bias_on_a_convolution_acts_as_under_diffusers(tinies: Mapping[str, Tiny], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ours, theirs = tinies["sd15"].copy(), tinies["sd15"].copy()
    shapes = {name: shape for name, shape in ours.shapes.items() if len(shape) == 4}
    drawn = lora_files.draw(shapes, biased=True)
    path = lora_files.write(
        tmp_path / "a.safetensors", SPELLINGS["diffusers, alpha in the notes"], dampened(drawn)
    )

    theirs.pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    bank = ours.bank()
    bank.hold({"a": ours.load(path)})
    with bank.rows([[LoraUse("a")]]):
        torch.testing.assert_close(ours.answer(), theirs.answer(), atol=1e-5, rtol=1e-5)


def test_rows_with_their_own_loras_and_scales_answer_as_alone(tiny: Tiny) -> None:
    ours = tiny.copy()
    bank = ours.bank()
    loras = {name: Lora(draw(ours, seed=seed, rank=seed)) for seed, name in enumerate("abc", 2)}
    bank.hold(loras)
    layers = layer_scales({"down_blocks": 2.0, "mid_block.resnets.0": 0.0}, ours.shapes)
    rows = [[LoraUse("a", 0.7)], [], [LoraUse("b", -0.5), LoraUse("c", 0.3)], [LoraUse("a", 1.0, layers)]]

    with bank.rows(rows):
        together = ours.answer(len(rows))
    for number, uses in enumerate(rows):
        with bank.rows([uses] * len(rows)):  # of the same inputs
            alone = ours.answer(len(rows))[number]
        torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[3]).abs().max() > 0.01


def test_a_batch_of_loras_is_the_weights_merged_row_by_row(tiny: Tiny) -> None:
    ours = tiny.copy()
    bank = ours.bank()
    loras = {name: Lora(draw(ours, seed=seed, rank=seed)) for seed, name in enumerate("ab", 2)}
    bank.hold(loras)
    rows = [[LoraUse("a", 0.7), LoraUse("b", 0.4)], [LoraUse("b", -0.5)]]

    with bank.rows(rows):
        together = ours.answer(len(rows))
    for number, uses in enumerate(rows):
        alone = merged(tiny, [(loras[use.name], use.scale) for use in uses]).answer(len(rows))[number]
        torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def merged(tiny: Tiny, loras: Sequence[tuple[Lora, float]]) -> Tiny:
    """A copy with W + Σ scale · up · down."""
    copied = tiny.copy()
    modules = copied.modules()
    for each, scale in loras:
        for name, layer in each.layers.items():
            modules[name].weight += scale * torch.tensordot(layer.up, layer.down, 1)
    return copied


@torch.inference_mode()
def test_a_map_of_layers_to_scales_takes_every_spelling_of_a_unet_and_its_encoders(
    tinies: Mapping[str, Tiny],
) -> None:
    shapes = tinies["sdxl"].shapes
    wish = {
        "unet": 0.1,
        "diffusion_model.input_blocks": 0.2,
        "down_blocks.0.resnets.0": 0.3,
        "diffusion_model.input_blocks.1.0.in_layers": 0.4,
        "lora_unet_output_blocks_0_1_proj_in": 0.5,
        "text_encoder.text_model": 0.6,
        "text_encoders.clip_g": 0.7,
    }
    scales = layer_scales(wish, shapes)
    assert scales.keys() == shapes.keys()
    assert scales["unet.mid_block.resnets.0.conv1"] == 0.1
    assert scales["unet.down_blocks.1.resnets.0.conv1"] == scales["unet.conv_in"] == 0.2
    assert scales["unet.down_blocks.0.resnets.0.conv2"] == 0.3
    assert scales["unet.down_blocks.0.resnets.0.conv1"] == 0.4
    assert scales["unet.up_blocks.0.attentions.0.proj_in"] == 0.5
    assert {scale for name, scale in scales.items() if name.startswith("text_encoder.")} == {0.6}
    assert {scale for name, scale in scales.items() if name.startswith("text_encoder_2.")} == {0.7}
    with pytest.raises(AssetError, match="double_blocks, input_blocks.9"):
        layer_scales({"double_blocks": 1.0, "input_blocks.9": 1.0, "mid_block": 1.0}, shapes)


def test_2000_names_for_the_full_size_sdxl_take_milliseconds(full_sizes: Mapping[str, FullSize]) -> None:
    shapes = full_sizes["sdxl"].shapes
    names = [*shapes, *(each for name in shapes for each in beginnings(name))]
    wish = dict.fromkeys(names[:2000], 0.5)

    start = time.thread_time()
    assert layer_scales(wish, shapes) == dict.fromkeys(shapes, 0.5)
    assert time.thread_time() - start < 10


def test_a_convolution_in_groups_carries_none() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))
    assert lora_keys.targets(module, ()) == {"unet.1": (4, 4, 3, 3)}


CONV = "lora_unet_down_blocks_0_resnets_0_conv1"  # [320, 320, 3, 3] at full size
PROJ = "lora_unet_down_blocks_0_attentions_0_proj_in"  # [320, 320, 1, 1]


def kohya(name: str, down: Sequence[int], up: Sequence[int]) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": torch.ones(*down),
        f"{name}.lora_up.weight": torch.ones(*up),
        f"{name}.alpha": torch.tensor(1.0),
    }


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "a LoRA for FLUX": (
        kohya("lora_unet_double_blocks_0_img_attn_qkv", (2, 3072), (9216, 2)),
        "none of its keys: lora_unet_double_blocks_0_img_attn_qkv.alpha",
    ),
    "FLUX with diffusers' names": (
        {f"transformer.single_transformer_blocks.0.proj_mlp.lora_{x}.weight": torch.ones(2, 2) for x in "AB"},
        "none of its keys: transformer.single_transformer_blocks.0.proj_mlp",
    ),
    "another kernel": (
        kohya(CONV, (2, 320, 1, 1), (320, 2, 1, 1)),
        rf"another model: {CONV}.lora_down.weight has the shape \[2, 320, 1, 1\] .*\[2, 320, 3, 3\]",
    ),
    "a flat kernel": (kohya(CONV, (2, 2880), (320, 2)), r"\[2, 2880\] .*\[2, 320, 3, 3\]"),
    "a large kernel on the way up": (
        kohya(CONV, (2, 320, 3, 3), (320, 2, 3, 3)),
        r"conv1.lora_up.weight has the shape \[320, 2, 3, 3\] .*\[320, 2\]",
    ),
    "other channels": (kohya(PROJ, (2, 640, 1, 1), (320, 2, 1, 1)), r"\[2, 640, 1, 1\] .*\[2, 320, 1, 1\]"),
    "kernel of one axis": (kohya(PROJ, (2, 320, 1), (320, 2, 1)), r"\[2, 320, 1\] .*\[2, 320, 1, 1\]"),
    "Tucker decomposition": (
        kohya(CONV, (2, 320, 1, 1), (320, 2, 1, 1)) | {f"{CONV}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        "a LoRA with Tucker decomposition, which is not supported",
    ),
    "DoRA": (
        kohya(PROJ, (2, 320, 1, 1), (320, 2, 1, 1)) | {f"{PROJ}.dora_scale": torch.ones(320, 1, 1, 1)},
        "is DoRA, which is not supported",
    ),
    "LoHa": ({f"{CONV}.hada_w1_a": torch.ones(2, 2)}, "is LoHa, which is not supported"),
    "LoKr": ({f"{CONV}.lokr_w1": torch.ones(2, 2)}, "is LoKr, which is not supported"),
    "two spellings of a layer": (
        kohya(CONV, (2, 320, 3, 3), (320, 2, 1, 1))
        | kohya("lora_unet_input_blocks_1_0_in_layers_2", (2, 320, 3, 3), (320, 2, 1, 1)),
        "unet.down_blocks.0.resnets.0.conv1 twice",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_name(
    kind: str, full_sizes: Mapping[str, FullSize], tmp_path: Path
) -> None:
    tensors, sentence = REFUSED[kind]
    save_file(tensors, tmp_path / "a")
    with pytest.raises(AssetError, match=sentence) as refusal:
        load(tmp_path / "a", full_sizes["sd15"].shapes)
    assert refusal.value.kind == "invalid_weights"


_UNET = "diffusers, the UNet alone"
OTHERS = [
    # another arrangement of blocks, and of text encoders
    ("sdxl", "kohya, original names", "sd15", "only partly.*no place for lora_te2"),
    ("sdxl", _UNET, "sd15", r"only partly.*no place for .*transformer_blocks.1\."),
    ("sd15", "kohya", "sdxl", "only partly.*no place for lora_unet_down_blocks_0_attentions_0"),
    # the same UNet but for the text's width, and a deeper text encoder
    ("sd2", "kohya", "sd15", "only partly.*no place for lora_te_text_model_encoder_layers_12"),
    ("sd2", _UNET, "sd15", r"another model: .*attn2.to_k.*\[1, 1024\] .*\[1, 768\]"),
    ("sd15", "kohya", "sd2", r"another model: .*\[1, 768\] .*\[1, 1024\]"),
]


@pytest.mark.parametrize(("kind", "spelling", "other", "sentence"), OTHERS)
def test_a_lora_for_another_stable_diffusion_is_refused_by_name(
    kind: str, spelling: str, other: str, sentence: str, full_sizes: Mapping[str, FullSize], tmp_path: Path
) -> None:
    drawn = lora_files.draw(full_sizes[kind].shapes, rank=1, dtype=torch.bfloat16)
    path = lora_files.write(tmp_path / "a", SPELLINGS[spelling], drawn)
    with pytest.raises(AssetError, match=sentence):
        load(path, full_sizes[other].shapes)
