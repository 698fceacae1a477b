"""LoRA files: every spelling loads to the same layers, as diffusers reads them; other files are refused."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from pipelines.adapters import lora
from pipelines.adapters.lora import Lora, LoraLayer
from pipelines.flux import lora_keys
from schemas.errors import AssetError
from tests.support import lora_files
from tests.support.lora_files import RANK, SPELLINGS, Shapes

Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def shapes(stock: Any) -> Shapes:
    return lora_keys.targets(stock.transformer, stock.text_encoder, stock.text_encoder_2)


@pytest.fixture(scope="module")
def full_size() -> Shapes:
    """FLUX.1-dev's own sizes, without weights."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            num_attention_heads=24,
            attention_head_dim=128,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
        t5 = T5EncoderModel(
            T5Config(
                d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
            )
        )
    return lora_keys.targets(transformer, clip, t5)


def load(path: Path, shapes: Shapes) -> Lora:
    return lora.load(path, lora_keys.translator(shapes), shapes)


def equal(ours: LoraLayer, theirs: LoraLayer) -> bool:
    if ours.bias is None or theirs.bias is None:
        biases = ours.bias is theirs.bias
    else:
        biases = torch.equal(ours.bias, theirs.bias)
    return biases and torch.equal(ours.down, theirs.down) and torch.equal(ours.up, theirs.up)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads_to_the_same_layers(
    spelling: str, biased: bool, shapes: Shapes, tmp_path: Path
) -> None:
    drawn = lora_files.draw(shapes, biased=biased)
    path = lora_files.write(tmp_path / "a", SPELLINGS[spelling], drawn)

    loaded = load(path, shapes)

    expected = lora_files.folded(drawn)
    written = {part for parts in lora_files.named(SPELLINGS[spelling], drawn).values() for part in parts}
    assert loaded.layers.keys() == written
    assert [name for name in written if not equal(loaded.layers[name], expected[name])] == []
    assert loaded.max_rank == RANK
    biases = sum(4 * shapes[name][0] for name in written) if biased else 0
    assert loaded.nbytes == sum(4 * RANK * sum(shapes[name]) for name in written) + biases


def test_the_spellings_cover_every_layer(shapes: Shapes) -> None:
    for spelling in ("diffusers", "kohya", "kohya, diffusers' names"):
        names = lora_files.named(SPELLINGS[spelling], lora_files.draw(shapes))
        assert {part for parts in names.values() for part in parts} == shapes.keys()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_for_the_full_size_model_has_nothing_left_over(
    spelling: str, full_size: Shapes, tmp_path: Path
) -> None:
    drawn = lora_files.draw(full_size, rank=1, dtype=torch.bfloat16)
    path = lora_files.write(tmp_path / "a", SPELLINGS[spelling], drawn)

    layers = load(path, full_size).layers

    for name, layer in layers.items():
        assert (len(layer.up), layer.down.shape[1]) == full_size[name]


def test_the_full_size_model_has_the_layers_of_flux_dev(full_size: Shapes) -> None:
    per_component = {
        component: sum(name.startswith(f"{component}.") for name in full_size)
        for component in ("transformer", "text_encoder", "text_encoder_2")
    }
    # 19 double blocks of 14 layers, 38 single blocks of 6, 10 around them; 12 × 6; 24 × 7
    assert per_component == {"transformer": 504, "text_encoder": 72, "text_encoder_2": 168}
    assert full_size["transformer.single_transformer_blocks.37.proj_out"] == (3072, 15360)
    assert full_size["transformer.transformer_blocks.18.norm1.linear"] == (18432, 3072)
    assert full_size["transformer.norm_out.linear"] == (6144, 3072)


# The spellings that diffusers converts by itself, and which layers of theirs. It ignores the last layer's
# alpha (lora_conversion_utils.py, "TODO: alphas"); under base_model.model it knows the blocks and proj_out.
LAST = {"transformer.norm_out.linear", "transformer.proj_out"}
CONVERTED: dict[str, Callable[[str], bool]] = {
    "kohya": lambda name: name not in LAST,
    "kohya, block-diagonal": lambda name: name not in LAST,
    "kohya, without alpha": lambda name: True,
    "ComfyUI, kohya's suffixes": lambda name: name not in LAST,
    "peft, original names": lambda name: "transformer_blocks" in name or name == "transformer.proj_out",
    "XLabs": lambda name: True,
}


@pytest.mark.parametrize("spelling", CONVERTED)
def test_layers_are_what_diffusers_makes_of_the_file(
    spelling: str, full_size: Shapes, tmp_path: Path
) -> None:
    known = [name for name in full_size if name.startswith("transformer.") and CONVERTED[spelling](name)]
    drawn = lora_files.draw({name: full_size[name] for name in known}, rank=2)
    path = lora_files.write(tmp_path / "a.safetensors", SPELLINGS[spelling], drawn)

    ours, theirs = load(path, full_size).layers, converted(path)

    assert ours.keys() == theirs.keys()
    for name in ours:
        probe = torch.randn(full_size[name][1], dtype=torch.float64)
        torch.testing.assert_close(
            change(ours[name], probe), change(theirs[name], probe), rtol=1e-5, atol=1e-5
        )


def converted(path: Path) -> dict[str, LoraLayer]:
    """A file by diffusers' own conversion, which needs no peft."""
    tensors = FluxPipeline.lora_state_dict(str(path.parent), weight_name=path.name, local_files_only=True)
    tensors = {"transformer." + key.removeprefix("transformer."): value for key, value in tensors.items()}
    return {
        key.removesuffix(".lora_A.weight"): LoraLayer(value, tensors[key.replace(".lora_A.", ".lora_B.")])
        for key, value in tensors.items()
        if key.endswith(".lora_A.weight")
    }


def change(layer: LoraLayer, probe: Tensor) -> Tensor:
    return layer.up.double() @ (layer.down.double() @ probe)


def test_a_bias_is_scaled_as_peft_scales_it(stock: Any, shapes: Shapes, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    blocks = {name: shape for name, shape in shapes.items() if "transformer_blocks" in name}
    drawn = lora_files.draw(blocks, biased=True)
    path = lora_files.write(tmp_path / "a.safetensors", SPELLINGS["diffusers, alpha in the notes"], drawn)

    ours = copy.deepcopy(stock.transformer)
    for name, layer in load(path, shapes).layers.items():
        module = ours.get_submodule(name.removeprefix("transformer."))
        module.weight.data += layer.up @ layer.down
        module.bias.data += layer.bias
    theirs = copy.deepcopy(stock)
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)

    torch.testing.assert_close(answer(ours), answer(theirs.transformer), atol=1e-5, rtol=1e-5)


def test_a_bias_may_stand_on_some_layers_only(shapes: Shapes, tmp_path: Path) -> None:
    save_file(good() | good(name=K) | {f"{K}.lora_B.bias": torch.ones(32)}, tmp_path / "a")

    layers = load(tmp_path / "a", shapes).layers

    assert layers[Q].bias is None
    assert equal(layers[K], LoraLayer(layers[K].down, layers[K].up, torch.ones(32)))


# What diffusers loads into a model of any size: it splits single blocks' linear1 at FLUX.1-dev's widths only.
LOADED = ["diffusers", "diffusers, alpha in the notes", "kohya", "ComfyUI, kohya's suffixes", "XLabs"]


@pytest.mark.parametrize("spelling", LOADED)
def test_the_transformer_answers_as_under_diffusers_own_loader(
    spelling: str, stock: Any, shapes: Shapes, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    blocks = {name: shape for name, shape in shapes.items() if "transformer_blocks" in name}
    if SPELLINGS[spelling].alpha == "keys":
        blocks = {name: shape for name, shape in blocks.items() if "single" not in name}
    path = lora_files.write(tmp_path / "a.safetensors", SPELLINGS[spelling], lora_files.draw(blocks))
    plain = answer(stock.transformer)

    ours = copy.deepcopy(stock.transformer)
    for name, layer in load(path, shapes).layers.items():
        ours.get_submodule(name.removeprefix("transformer.")).weight.data += layer.up.float() @ layer.down
    theirs = copy.deepcopy(stock)
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)

    assert (answer(ours) - plain).abs().max() > 0.01
    torch.testing.assert_close(answer(ours), answer(theirs.transformer), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def answer(transformer: Any) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(5)
    out: Tensor = transformer(
        hidden_states=torch.randn(1, 6, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 4, 32, generator=generator),
        pooled_projections=torch.randn(1, 32, generator=generator),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        txt_ids=torch.zeros(4, 3),
        img_ids=torch.zeros(6, 3),
        return_dict=False,
    )[0]
    return out


def test_a_missing_alpha_scales_by_one(shapes: Shapes, tmp_path: Path) -> None:
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    save_file({f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}, tmp_path / "a")

    assert equal(load(tmp_path / "a", shapes).layers[Q], LoraLayer(down, up))


def test_half_precision_keeps_small_values_under_a_small_alpha(shapes: Shapes, tmp_path: Path) -> None:
    up = torch.full((32, 1), 3e-5).half()
    tensors = {f"{Q}.lora_down.weight": torch.ones(1, 32).half(), f"{Q}.lora_up.weight": up}
    save_file(tensors | {f"{Q}.alpha": torch.tensor(0.001)}, tmp_path / "a")

    torch.testing.assert_close(load(tmp_path / "a", shapes).layers[Q].up, up.float() * 0.001)


def test_rank_stabilised_scale_comes_from_the_notes(shapes: Shapes, tmp_path: Path) -> None:
    up = torch.randn(32, 4)
    tensors = {f"{Q}.lora_A.weight": torch.randn(4, 32), f"{Q}.lora_B.weight": up}
    settings = {"transformer.lora_alpha": 6, "transformer.use_rslora": True}
    save_file(tensors, tmp_path / "a", {"lora_adapter_metadata": json.dumps(settings)})

    assert torch.equal(load(tmp_path / "a", shapes).layers[Q].up, up * 3)


def good(rank: int = 2, size: int = 32, name: str = Q) -> dict[str, Tensor]:
    return {
        f"{name}.lora_A.weight": torch.randn(rank, size),
        f"{name}.lora_B.weight": torch.randn(size, rank),
    }


def kohya(name: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": torch.randn(2, columns),
        f"{name}.lora_up.weight": torch.randn(rows, 2),
        f"{name}.alpha": torch.tensor(2.0),
    }


SDXL = {
    key: tensor
    for block in (4, 5, 7)
    for part in ("to_q", "to_k", "to_v")
    for key, tensor in kohya(
        f"lora_unet_input_blocks_{block}_1_transformer_blocks_0_attn1_{part}", 640, 640
    ).items()
}
K = Q.replace("to_q", "to_k")
KOHYA_QKV = "lora_unet_double_blocks_0_img_attn_qkv"
CLIP_FC = "lora_te1_text_model_encoder_layers_0_mlp_fc1"

NORM = "transformer.transformer_blocks.0.attn.norm_q.weight"
BFL_NORM = "double_blocks.0.img_attn.norm.query_norm.scale"

HUGE = torch.full((2, 32), 1e300, dtype=torch.float64)

REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "a LoRA for SDXL": (SDXL, r"none of its keys: .*input_blocks_4_1.* and 22 more"),
    "SDXL with a text encoder": (
        SDXL | kohya(CLIP_FC, 37, 32),
        "only partly.*input_blocks_4_1.* and 22 more",
    ),
    "no LoRA at all": ({"encoder.weight": torch.ones(2, 2)}, "none of its keys: encoder.weight"),
    "some of its layers elsewhere": (good() | good(name="up.0"), r"partly.*up.0.lora_A.weight, up.0.lora_B"),
    "a block too many": (good() | good(name=Q.replace("0", "7")), r"partly.*blocks.7.attn.to_q.lora_A"),
    "a key that is not LoRA's": (good() | {f"{Q}.weight": torch.ones(1)}, r"partly.*to_q.weight"),
    "a wider base": (
        good(size=48),
        r"another model: .*to_q.lora_A.weight has the shape \[2, 48\] .*\[2, 32\]",
    ),
    "a wider fused base": (kohya(KOHYA_QKV, 144, 48), r"another model: .*img_attn_qkv.*\[2, 48\]"),
    "a fused layer without v": (kohya(KOHYA_QKV, 64, 32), r"another model: .*lora_up.* \[64, 2\].*\[96, 2\]"),
    "ranks that differ": (good() | {f"{Q}.lora_B.weight": torch.ones(32, 3)}, r"lora_B.weight .*\[32, 3\]"),
    "down is a vector": (
        good() | {f"{Q}.lora_A.weight": torch.ones(2)},
        r"lora_A.weight has the shape \[2\]",
    ),
    "down is a number": (good() | {f"{Q}.lora_A.weight": torch.tensor(1.0)}, r"lora_A.weight .* \[\]"),
    "a 3×3 convolution": (good() | {f"{Q}.lora_A.weight": torch.ones(2, 32, 3, 3)}, r"\[2, 32, 3, 3\]"),
    "alpha is a vector": (good() | {f"{Q}.alpha": torch.ones(2)}, r"to_q.alpha has the shape \[2\]"),
    "rank 513": (good(rank=513), "to_q.lora_A.weight has rank 513; at most 512"),
    "rank 100,000": (good(rank=100_000), "has rank 100000"),
    "rank 0": (good(rank=0), r"to_q.lora_A.weight has the shape \[0, 32\]"),
    "down without up": ({f"{Q}.lora_A.weight": torch.ones(2, 32)}, r"down without up.*to_q.lora_A.weight"),
    "up without down": (
        good(name=K) | {f"{Q}.lora_B.weight": torch.ones(32, 2)},
        "a part.*to_q.lora_B.weight",
    ),
    "alpha alone": (good(name=K) | {f"{Q}.alpha": torch.tensor(1.0)}, "a part.*to_q.alpha"),
    "two spellings of a layer": (good() | kohya(KOHYA_QKV, 96, 32), f"{Q} twice: .*{KOHYA_QKV}"),
    "two prefixes of a layer": (good() | good(name=f"base_model.model.{Q}"), f"{Q} twice"),
    "two suffixes of a layer": (good() | {f"{Q}.lora_down.weight": torch.ones(2, 32)}, f"{Q} twice"),
    "two adapters": (good() | {f"{Q}.lora_A.other.weight": torch.ones(2, 32)}, f"{Q} twice"),
    "DoRA": (good() | {f"{Q}.dora_scale": torch.ones(32)}, "is DoRA, which is not supported: .*dora_scale"),
    "DoRA by peft": (good() | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "is DoRA"),
    "LoHa": ({f"{KOHYA_QKV}.hada_w1_a": torch.ones(2, 2)}, "is LoHa, which is not supported"),
    "LoKr": ({f"{KOHYA_QKV}.lokr_w1": torch.ones(2, 2)}, "is LoKr, which is not supported"),
    "a bias on down": (
        good() | {f"{Q}.lora_A.bias": torch.ones(2)},
        "biases on its down side, .* not supported: .*lora_A.bias",
    ),
    "kohya's bias on down": (
        kohya(KOHYA_QKV, 96, 32) | {f"{KOHYA_QKV}.lora_down.bias": torch.ones(2)},
        "biases on its down side",
    ),
    "a bias alone": (good(name=K) | {f"{Q}.lora_B.bias": torch.ones(32)}, "a part.*to_q.lora_B.bias"),
    "two biases": (
        good() | {f"{Q}.lora_B.bias": torch.ones(32), f"{Q}.lora_up.bias": torch.ones(32)},
        f"{Q} twice",
    ),
    "a bias of another size": (
        good() | {f"{Q}.lora_B.bias": torch.ones(48)},
        r"another model: .*to_q.lora_B.bias has the shape \[48\] .*\[32\]",
    ),
    "a fused bias without v": (
        kohya(KOHYA_QKV, 96, 32) | {f"{KOHYA_QKV}.lora_up.bias": torch.ones(64)},
        r"lora_up.bias has the shape \[64\] .*\[96\]",
    ),
    "NaN in a bias": (
        good() | {f"{Q}.lora_B.bias": torch.full((32,), torch.nan)},
        "not finite.*lora_B.bias",
    ),
    "a control LoRA where nothing reads a control image": (
        kohya("img_in", 32, 128),
        r"another model: img_in.lora_down.weight has the shape \[2, 128\] .*\[2, 64\]",
    ),
    "norms where none may be replaced": (good() | {NORM: torch.ones(16)}, f"partly.*{NORM}"),
    "differences": ({f"{KOHYA_QKV}.diff": torch.ones(2, 2)}, "weight differences, .* not supported"),
    "differences of biases": (good() | {f"{Q}.diff_b": torch.ones(32)}, "weight differences.*to_q.diff_b"),
    "NaN in down": (good() | {f"{Q}.lora_A.weight": torch.full((2, 32), torch.nan)}, "not finite.*lora_A"),
    "infinity in up": (good() | {f"{Q}.lora_B.weight": torch.full((32, 2), torch.inf)}, "not finite.*lora_B"),
    "NaN for alpha": (good() | {f"{Q}.alpha": torch.tensor(torch.nan)}, "not finite.*lora_B"),
    "an alpha past all bounds": (
        good() | {f"{Q}.alpha": torch.tensor(1e300, dtype=torch.float64)},
        "not finite.*lora_B",
    ),
    "values past 32 bits": (good() | {f"{Q}.lora_A.weight": HUGE}, "not finite"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_name(kind: str, shapes: Shapes, tmp_path: Path) -> None:
    tensors, sentence = REFUSED[kind]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "a")

    start = time.thread_time()
    with pytest.raises(AssetError, match=sentence) as refusal:
        load(tmp_path / "a", shapes)
    assert time.thread_time() - start < 20
    assert refusal.value.kind == "invalid_weights"
    assert refusal.value.message[-1] == "."


# With norms that may be replaced, and x_embedder wide.
CONTROL_REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "a norm of another size": (
        good() | {NORM: torch.ones(128)},
        r"another model: .*norm_q.weight has the shape \[128\] .*\[16\]",
    ),
    "a norm that is a number": (
        good() | {BFL_NORM: torch.tensor(1.0)},
        r"query_norm.scale has the shape \[\]",
    ),
    "NaN in a norm": (good() | {BFL_NORM: torch.full((16,), torch.nan)}, f"not finite.*{BFL_NORM}"),
    "two spellings of a norm": (
        good() | {NORM: torch.ones(16), BFL_NORM: torch.ones(16)},
        "attn.norm_q twice",
    ),
    "a norm of a block too many": (good() | {BFL_NORM.replace("0", "7"): torch.ones(16)}, "partly.*blocks.7"),
    "a LoRA on a norm": (good() | good(name=NORM.removesuffix(".weight"), size=16), "partly.*norm_q.lora_A"),
    "a layer's weight": (good() | {f"{Q}.weight": torch.ones(32, 32)}, "partly.*to_q.weight"),
    "norms alone": ({BFL_NORM: torch.ones(16)}, f"not a LoRA.*{BFL_NORM}"),
    "a whole checkpoint": (
        {BFL_NORM: torch.ones(16), "double_blocks.0.img_attn.qkv.weight": torch.ones(96, 32)},
        "not a LoRA.*img_attn.qkv.weight",
    ),
    "three times as wide": (kohya("img_in", 32, 192), r"img_in.*\[2, 192\] .*\[2, 64\]"),
    "wide elsewhere": (kohya("txt_in", 32, 64), r"txt_in.*\[2, 64\] .*\[2, 32\]"),
    "wide with NaN": (
        kohya("img_in", 32, 128) | {"img_in.lora_down.weight": torch.full((2, 128), torch.nan)},
        "not finite.*img_in.lora_down",
    ),
}


@pytest.mark.parametrize("kind", CONTROL_REFUSED)
def test_a_control_lora_that_does_not_fit_is_refused_by_name(
    kind: str, stock: Any, shapes: Shapes, tmp_path: Path
) -> None:
    tensors, sentence = CONTROL_REFUSED[kind]
    save_file(tensors, tmp_path / "a")
    norms = lora_keys.norms(stock.transformer)
    translate = lora_keys.translator(shapes, norms)

    with pytest.raises(AssetError, match=sentence) as refusal:
        lora.load(tmp_path / "a", translate, shapes, norms=norms, wide=lora_keys.WIDE)
    assert refusal.value.kind == "invalid_weights"


@pytest.mark.parametrize(
    ("notes", "sentence"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not an object"),
        ('{"transformer.lora_alpha": "8"}', "lora_alpha"),
        ('{"transformer.lora_alpha": NaN}', "lora_alpha"),
        ('{"transformer.lora_alpha": 1' + "0" * 400 + "}", "lora_alpha"),
        ('{"transformer.alpha_pattern": {"to_q": 4}}', "by pattern, .*transformer.alpha_pattern"),
    ],
)
def test_notes_that_make_no_sense_are_refused(
    notes: str, sentence: str, shapes: Shapes, tmp_path: Path
) -> None:
    save_file(good(), tmp_path / "a", {"lora_adapter_metadata": notes})

    with pytest.raises(AssetError, match=sentence):
        load(tmp_path / "a", shapes)


def test_what_layers_share_they_share_in_page_locked_memory_too() -> None:
    down, weight = torch.randn(2, 4), torch.randn(3)
    layers = {name: LoraLayer(down, torch.randn(4, 2), torch.randn(4)) for name in "qk"}
    before = Lora(layers, LoraLayer(down, torch.randn(4, 2)), {"norm": weight})
    after = before.pinned(pin=Tensor.clone)
    assert after.layers["q"].down is after.layers["k"].down is not down
    assert after.control is not None and after.control.down is after.layers["q"].down
    for name, layer in after.layers.items():
        assert equal(layer, before.layers[name])
        assert layer.bias is not before.layers[name].bias
    assert torch.equal(after.norms["norm"], weight)
