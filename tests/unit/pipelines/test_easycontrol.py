"""EasyControl: the keys and values computed once are those of the joint forward of the paper."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pipelines.flux import easycontrol
from pipelines.flux.attention import KeyValues, WideAttention
from pipelines.flux.easycontrol import Condition, EasyControl, Kind
from pipelines.flux.sampling import Grid, image_ids
from schemas.errors import AssetError
from tests.support import easycontrols

TEXT, TARGET = 5, Grid(3, 4)
GUIDANCE = 3.5

Tensors = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def transformer(stock: Any) -> Any:
    return copy.deepcopy(stock.transformer)


@pytest.fixture(scope="module")
def without_guidance(transformer: Any) -> Any:
    """As FLUX.1 [schnell] is."""
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    torch.manual_seed(3)
    return FluxTransformer2DModel(**(config | {"guidance_embeds": False})).eval()


@dataclass(frozen=True)
class Row:
    """A row of a forward, and the conditions it attends to."""

    image: Tensor
    text: Tensor
    pooled: Tensor
    conditions: Sequence[Condition] = ()


def draw_row(seed: int, *conditions: Condition) -> Row:
    generator = torch.Generator("cpu").manual_seed(seed)
    image, text = (
        torch.randn(TARGET.tokens, 64, generator=generator),
        torch.randn(TEXT, 32, generator=generator),
    )
    return Row(image, text, torch.randn(32, generator=generator), conditions)


def draw_condition(control: EasyControl, seed: int, kind: Kind, grid: Grid, scale: float = 1.0) -> Condition:
    tokens = torch.randn(grid.tokens, 64, generator=torch.Generator("cpu").manual_seed(seed))
    return Condition(tokens, easycontrol.position_ids(kind, grid, TARGET), control, scale)


@pytest.fixture(scope="module")
def controls(transformer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[EasyControl]:
    folder = tmp_path_factory.mktemp("easycontrols")
    return [
        easycontrol.load(easycontrols.write(folder / str(seed), easycontrols.draw(seed)), transformer)
        for seed in range(2)
    ]


@pytest.fixture(scope="module")
def conditions(controls: list[EasyControl]) -> list[Condition]:
    return [
        draw_condition(controls[0], 10, "spatial", Grid(2, 2)),
        draw_condition(controls[1], 11, "subject", Grid(2, 1), scale=0.7),
    ]


def run(transformer: Any, rows: Sequence[Row], time: float = 0.5) -> Tensor:
    """A forward whose rows attend to the keys and values of their conditions."""
    banks = [
        [easycontrol.keys_values(transformer, each, GUIDANCE, row.pooled) for each in row.conditions]
        for row in rows
    ]
    return forward(transformer, rows, banks, time)


@torch.inference_mode()
def forward(
    transformer: Any, rows: Sequence[Row], banks: Sequence[Sequence[KeyValues]], time: float
) -> Tensor:
    attention = WideAttention(transformer)
    with attention.rows(TEXT, banks, [None] * len(rows)):
        velocity: Tensor = transformer(
            hidden_states=torch.stack([row.image for row in rows]),
            encoder_hidden_states=torch.stack([row.text for row in rows]),
            pooled_projections=torch.stack([row.pooled for row in rows]),
            timestep=torch.full([len(rows)], time),
            guidance=torch.full([len(rows)], GUIDANCE) if transformer.config.guidance_embeds else None,
            txt_ids=torch.zeros(TEXT, 3),
            img_ids=image_ids(TARGET),
            return_dict=False,
        )[0]
    return velocity


class Joint:
    """One forward of text, image and conditions under a mask, each stream with its own time and LoRA.

    Written from the paper, apart from what it is compared with: stream 0 is the text's, 1 the image's.
    """

    def __init__(self, transformer: Any, row: Row, files: Sequence[Tensors], time: float) -> None:
        self.model, self.row, self.files = transformer, row, files
        lengths = [TEXT, TARGET.tokens, *(len(each.tokens) for each in row.conditions)]
        stream = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self.mask = (stream[:, None] < 2) | (stream[:, None] == stream[None, :])
        self.lengths = lengths
        self.times = [self._time(time)] * 2 + [self._time(0.0)] * len(row.conditions)
        ids = [torch.zeros(TEXT, 3), image_ids(TARGET), *(each.ids for each in row.conditions)]
        self.rotary = transformer.pos_embed(torch.cat(ids))

    def _time(self, time: float) -> Tensor:
        numbers = [torch.tensor([time * 1000])]
        if self.model.config.guidance_embeds:
            numbers.append(torch.tensor([GUIDANCE * 1000]))
        embedded: Tensor = self.model.time_text_embed(*numbers, self.row.pooled[None])
        return embedded

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        tokens = [self.row.image, *(each.tokens for each in self.row.conditions)]
        xs = [self.model.context_embedder(self.row.text[None])]
        xs += [self.model.x_embedder(each[None]) for each in tokens]
        for number, block in enumerate(self.model.transformer_blocks):
            xs = self._double(f"transformer_blocks.{number}.attn.processor", block, xs)
        for number, block in enumerate(self.model.single_transformer_blocks):
            xs = self._single(f"single_transformer_blocks.{number}.attn.processor", block, xs)
        velocity: Tensor = self.model.proj_out(self.model.norm_out(xs[1], self.times[1]))
        return velocity[0]

    def _double(self, name: str, block: Any, xs: list[Tensor]) -> list[Tensor]:
        attn, others = block.attn, len(xs) - 1
        norms = [block.norm1_context, *[block.norm1] * others]
        norms_2 = [block.norm2_context, *[block.norm2] * others]
        forwards = [block.ff_context, *[block.ff] * others]
        text_layers = (
            attn.add_q_proj,
            attn.add_k_proj,
            attn.add_v_proj,
            attn.norm_added_q,
            attn.norm_added_k,
        )
        layers = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        normed = [norm(x, emb=time) for norm, x, time in zip(norms, xs, self.times, strict=True)]
        parts = [each[0] for each in normed]
        seen = self._attend(name, parts, [text_layers, *[layers] * others])
        out = []
        for index, x in enumerate(xs):
            _, gate, shift, scale, gate_2 = normed[index]
            attended = (attn.to_add_out if index == 0 else attn.to_out[0])(seen[index])
            x = x + gate[:, None] * (attended + self._lora(index, f"{name}.proj_loras", attended))
            inner = norms_2[index](x) * (1 + scale[:, None]) + shift[:, None]
            out.append(x + gate_2[:, None] * forwards[index](inner))
        return out

    def _single(self, name: str, block: Any, xs: list[Tensor]) -> list[Tensor]:
        attn = block.attn
        layers = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        normed = [block.norm(x, emb=time) for x, time in zip(xs, self.times, strict=True)]
        seen = self._attend(name, [each[0] for each in normed], [layers] * len(xs))
        out = []
        for x, attended, (inner, gate) in zip(xs, seen, normed, strict=True):
            both = torch.cat([attended, block.act_mlp(block.proj_mlp(inner))], dim=2)
            out.append(x + gate[:, None] * block.proj_out(both))
        return out

    def _attend(self, name: str, xs: list[Tensor], layers: Sequence[tuple[Any, ...]]) -> Sequence[Tensor]:
        heads: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for index, (x, (to_q, to_k, to_v, norm_q, norm_k)) in enumerate(zip(xs, layers, strict=True)):
            for letter, project, norm in (
                ("q", to_q, norm_q),
                ("k", to_k, norm_k),
                ("v", to_v, nn.Identity()),
            ):
                projected = project(x) + self._lora(index, f"{name}.{letter}_loras", x)
                heads[letter].append(norm(projected.view(1, -1, 2, 16)))
        query, key, value = (torch.cat(each, dim=1).transpose(1, 2) for each in heads.values())
        query, key = (apply_rotary_emb(each, self.rotary) for each in (query, key))
        seen = scaled_dot_product_attention(query, key, value, self.mask)
        return seen.transpose(1, 2).flatten(2).split_with_sizes(self.lengths, dim=1)

    def _lora(self, stream: int, name: str, x: Tensor) -> Tensor:
        if stream < 2:
            return torch.zeros(())
        file, scale = self.files[stream - 2], self.row.conditions[stream - 2].scale
        return scale * (x @ file[f"{name}.0.down.weight"].T @ file[f"{name}.0.up.weight"].T)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("model", ["transformer", "without_guidance"])
@pytest.mark.parametrize("chosen", [[0], [1], [0, 1]])
def test_keys_and_values_computed_once_serve_every_image_and_time_of_the_joint_forward(
    request: pytest.FixtureRequest, conditions: list[Condition], model: str, chosen: list[int]
) -> None:
    transformer = request.getfixturevalue(model)
    files = [easycontrols.draw(seed) for seed in chosen]
    row = draw_row(0, *(conditions[index] for index in chosen))
    banks = [easycontrol.keys_values(transformer, each, GUIDANCE, row.pooled) for each in row.conditions]
    plain = replace(row, conditions=())
    for image, time in ((row.image, 0.9), (torch.randn_like(row.image), 0.2)):
        of_row, of_plain = replace(row, image=image), replace(plain, image=image)
        ours = forward(transformer, [of_row], [banks], time)[0]
        close(ours, Joint(transformer, of_row, files, time)())
        assert distance(ours, forward(transformer, [of_plain], [[]], time)[0]) > 0.01


def test_the_order_of_conditions_means_nothing(transformer: Any, conditions: list[Condition]) -> None:
    ours = run(transformer, [draw_row(0, *conditions), draw_row(0, *reversed(conditions))])
    close(ours[0], ours[1])


def test_rows_with_different_conditions_or_none_are_as_alone(
    transformer: Any, conditions: list[Condition]
) -> None:
    first, second = conditions
    rows = [draw_row(0, first), draw_row(1), draw_row(2, second, first), draw_row(3, second), draw_row(4)]
    together = run(transformer, rows)
    for row, ours in zip(rows, together, strict=True):
        close(ours, run(transformer, [row])[0])


def test_the_scale_counts_and_a_plain_picture_is_left_at_zero(
    transformer: Any, conditions: list[Condition]
) -> None:
    at = {
        scale: run(transformer, [draw_row(0, replace(conditions[0], scale=scale))])
        for scale in (0.0, 0.5, 1.0, -1.0)
    }
    assert all(distance(at[0.0], at[scale]) > 1e-3 for scale in (0.5, 1.0, -1.0))
    assert distance(at[1.0], at[-1.0]) > 1e-3
    assert distance(at[0.0], run(transformer, [draw_row(0)])) > 1e-3


def first_keys(bank: KeyValues) -> Tensor:
    return bank.blocks[0][0]


def test_keys_follow_the_prompt_and_the_guidance(
    transformer: Any, without_guidance: Any, conditions: list[Condition]
) -> None:
    pooled = draw_row(0).pooled

    def keys(model: Any, guidance: float, pooled: Tensor) -> Tensor:
        return first_keys(easycontrol.keys_values(model, conditions[0], guidance, pooled))

    usual = keys(transformer, 3.5, pooled)
    assert distance(keys(transformer, 3.5, -pooled), usual) > 1e-3
    assert distance(keys(transformer, 9.0, pooled), usual) > 1e-3
    assert torch.equal(keys(without_guidance, 3.5, pooled), keys(without_guidance, 9.0, pooled))


def test_hooks_on_the_layers_act_as_if_merged_into_them(stock: Any, conditions: list[Condition]) -> None:
    """So LoRAs beside the weights reach conditions too, wherever they are."""
    hooked, merged = copy.deepcopy(stock.transformer), copy.deepcopy(stock.transformer)

    def hook(change: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda module, inputs, output: output + inputs[0] @ change.T

    for name, module in hooked.named_modules():
        if isinstance(module, nn.Linear):
            change = torch.randn_like(module.weight) / 50
            module.register_forward_hook(hook(change))
            merged.get_submodule(name).weight.data += change
    plain, ours, theirs = (
        easycontrol.keys_values(model, conditions[0], GUIDANCE, draw_row(0).pooled).blocks
        for model in (stock.transformer, hooked, merged)
    )
    for index in range(4):
        for ours_part, theirs_part in zip(ours[index], theirs[index], strict=True):
            torch.testing.assert_close(ours_part, theirs_part, atol=1e-4, rtol=1e-4)
        assert distance(ours[index][0], plain[index][0]) > 1e-3


def test_what_rows_look_at_meanwhile_does_not_reach_conditions(
    transformer: Any, conditions: list[Condition]
) -> None:
    pooled = draw_row(0).pooled
    usual = easycontrol.keys_values(transformer, conditions[0], GUIDANCE, pooled)
    with WideAttention(transformer).rows(TEXT, [[usual]], [None]):
        within = easycontrol.keys_values(transformer, conditions[0], GUIDANCE, pooled)
    for ours, theirs in zip(within.blocks, usual.blocks, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_and_values_are_in_the_transformers_dtype_and_about_right(
    stock: Any, conditions: list[Condition], dtype: torch.dtype
) -> None:
    pooled = draw_row(0).pooled
    exact = easycontrol.keys_values(stock.transformer, conditions[0], GUIDANCE, pooled)
    half = copy.deepcopy(stock.transformer).to(dtype)
    rough = easycontrol.keys_values(half, conditions[0], GUIDANCE, pooled)
    assert {part.dtype for pair in rough.blocks for part in pair} == {dtype}
    assert rough.nbytes == exact.nbytes // 2 == 4 * 2 * 4 * 32 * 2
    for ours, theirs in zip(rough.blocks, exact.blocks, strict=True):
        for rough_part, exact_part in zip(ours, theirs, strict=True):
            cosine = torch.cosine_similarity(rough_part.float().flatten(), exact_part.flatten(), dim=0)
            assert cosine > 0.99


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_loads_to_its_tensors_with_and_without_prefix(
    transformer: Any, tmp_path: Path, prefix: str, dtype: torch.dtype
) -> None:
    drawn = easycontrols.draw(dtype=dtype)
    control = easycontrol.load(easycontrols.write(tmp_path / "a", drawn, prefix), transformer)
    for number, block in enumerate(control.blocks):
        name = f"{'' if number < 2 else 'single_'}transformer_blocks.{number % 2}.attn.processor"
        layers = {"q": block.q, "k": block.k, "v": block.v, "proj": block.proj}
        for letter, layer in layers.items():
            if layer is None:
                assert letter == "proj" and number >= 2
                continue
            assert torch.equal(layer.down, drawn[f"{name}.{letter}_loras.0.down.weight"])
            assert torch.equal(layer.up, drawn[f"{name}.{letter}_loras.0.up.weight"])
    assert control.nbytes == sum(tensor.nbytes for tensor in drawn.values())


def test_a_loaded_file_may_go_away_and_ranks_may_differ(transformer: Any, tmp_path: Path) -> None:
    drawn, wide = easycontrols.draw(), easycontrols.draw(rank=7)
    Q = "transformer_blocks.1.attn.processor.q_loras.0"
    mixed = drawn | {key: wide[key] for key in drawn if key.startswith(Q)}
    path = easycontrols.write(tmp_path / "a", mixed)
    control = easycontrol.load(path, transformer)
    path.unlink()
    assert [block.q.rank for block in control.blocks] == [4, 7, 4, 4]


GOOD = easycontrols.draw()
Q = "transformer_blocks.0.attn.processor.q_loras.0"
DOWN, UP = f"{Q}.down.weight", f"{Q}.up.weight"
SINGLE = "single_transformer_blocks.1.attn.processor.v_loras.0"


def good(without: str = "nothing", **others: Tensor) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in GOOD.items() if not key.startswith(without)} | others


def drawn(doubles: int, singles: int, width: int) -> dict[str, Tensor]:
    return {key: torch.ones(shape) for key, shape in easycontrols.shapes(doubles, singles, width).items()}


PEFT = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
XLABS = "double_blocks.0.processor.qkv_lora1.down.weight"

REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "an ordinary LoRA": ({PEFT: torch.ones(4, 32)}, "an ordinary LoRA, not an EasyControl; .*LoRAs: .*to_q"),
    "kohya's": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 32)}, "ordinary"),
    "XLabs'": ({XLABS: torch.ones(4, 32)}, "ordinary LoRA.*qkv_lora1"),
    "something else": ({"encoder.weight": torch.ones(2, 2)}, "not an EasyControl .*keys: encoder.weight"),
    "a larger model's": (drawn(3, 2, 32), r"only partly.*transformer_blocks\.2\..* and 3 more"),
    "a smaller model's": (drawn(2, 1, 32), r"lacks single_transformer_blocks\.1\..* and 1 more"),
    "a wider model's": (drawn(2, 2, 48), r"another model: .*\[4, 48\] where \[4, 32\] is expected"),
    "a LoRA beside it": (good() | {PEFT: torch.ones(4, 32)}, r"only partly.*to_q\.lora_A"),
    "alpha": (good() | {f"{Q}.alpha": torch.tensor(4.0)}, r"no place for .*q_loras\.0\.alpha"),
    "biases": (good() | {f"{Q}.up.bias": torch.ones(32)}, r"no place for .*up\.bias"),
    "two conditions": (good() | {DOWN.replace("s.0.d", "s.1.d"): GOOD[DOWN]}, r"no place for .*q_loras\.1\."),
    "proj in a single block": (
        good() | {f"{SINGLE.replace('v_loras', 'proj_loras')}.up.weight": torch.ones(32, 4)},
        "no place for single.*proj_loras",
    ),
    "down alone": (good(without=UP), rf"lacks {UP}\."),
    "no v in the last block": (good(without=SINGLE), rf"lacks {SINGLE}.down.weight, {SINGLE}.up.weight\."),
    "no proj": (
        good(without=Q.replace("q_", "proj_")),
        "lacks transformer_blocks.0.attn.processor.proj_loras.0.down.weight",
    ),
    "two prefixes": (good() | {f"transformer.{DOWN}": GOOD[DOWN]}, f"has {DOWN} twice"),
    "ranks that differ": (good() | {UP: torch.ones(32, 3)}, r"q_loras.0.up.weight .*\[32, 3\].*\[32, 4\]"),
    "down is a vector": (good() | {DOWN: torch.ones(4)}, r"down.weight has the shape \[4\]"),
    "down is a number": (good() | {DOWN: torch.tensor(1.0)}, r"down.weight has the shape \[\]"),
    "a convolution": (good() | {DOWN: torch.ones(4, 32, 1, 1)}, r"\[4, 32, 1, 1\]"),
    "rank 513": (
        good() | {DOWN: torch.ones(513, 32), UP: torch.ones(32, 513)},
        "rank 513; at most 512 is accepted",
    ),
    "NaN": (good() | {UP: torch.full((32, 4), torch.nan)}, f"not finite numbers, in {UP}"),
    "infinity": (good() | {DOWN: torch.full((4, 32), -torch.inf)}, f"not finite numbers, in {DOWN}"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_name(kind: str, transformer: Any, tmp_path: Path) -> None:
    tensors, sentence = REFUSED[kind]
    with pytest.raises(AssetError, match=sentence) as refusal:
        easycontrol.load(easycontrols.write(tmp_path / "a", tensors), transformer)
    assert refusal.value.kind == "invalid_weights"
    assert refusal.value.message[-1] == "."


def test_a_subject_lies_beside_the_target_with_the_grid_of_its_own() -> None:
    ids = easycontrol.position_ids("subject", Grid(2, 3), Grid(40, 50))
    assert torch.equal(ids, image_ids(Grid(2, 3)) + torch.tensor([0.0, 64.0, 0.0]))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 130), st.integers(1, 130))
def test_a_spatial_condition_lies_on_the_target(rows: int, columns: int, high: int, wide: int) -> None:
    ids = easycontrol.position_ids("spatial", Grid(rows, columns), Grid(high, wide))
    torch.testing.assert_close(
        ids,
        torch.tensor([[0, y * high / rows, x * wide / columns] for y in range(rows) for x in range(columns)]),
    )


def test_a_spatial_condition_is_stretched_to_the_square() -> None:
    picture = Image.new("RGB", (40, 10), "white")
    picture.paste("black", (20, 0, 40, 10))
    pixels = easycontrol.fit(picture, "spatial", 64)
    assert pixels.shape == (3, 64, 64)
    assert (pixels[:, :, :28] == 1).all()
    assert (pixels[:, :, 36:] == -1).all()
    assert pixels.dtype == torch.float32


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([16, 64, 80]))
def test_a_subject_keeps_its_proportions_in_the_middle_of_grey(width: int, height: int, size: int) -> None:
    pixels = easycontrol.fit(Image.new("RGB", (width, height), "white"), "subject", size)

    assert pixels.shape == (3, size, size)
    shown = [int(side) for side in ((pixels[0] == 1).any(dim=0).sum(), (pixels[0] == 1).any(dim=1).sum())]
    assert int((pixels == 1).sum()) == 3 * shown[0] * shown[1]  # a rectangle
    assert int((pixels == 0).sum()) == 3 * (size**2 - shown[0] * shown[1])
    assert torch.equal(pixels, pixels.flip(1, 2))  # in the middle
    tokens = [max(1, side * size // (16 * max(width, height))) for side in (width, height)]
    assert shown == [16 * each for each in tokens]


@pytest.fixture(scope="module")
def full_size() -> Any:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)


def test_a_file_of_real_size_fits_flux_dev(full_size: Any, tmp_path: Path) -> None:
    shapes = easycontrols.shapes(19, 38, 3072, rank=128)
    assert len(shapes) == 2 * (19 * 4 + 38 * 3)
    control = easycontrol.load(easycontrols.write_zeros(tmp_path / "a", shapes), full_size)
    assert control.nbytes == (19 * 4 + 38 * 3) * 2 * 128 * 3072 * 2

    ids = easycontrol.position_ids("spatial", Grid(32, 32), Grid(64, 64))
    condition = Condition(torch.empty(1024, 64, device="meta"), ids, control, 1.0)
    bank = easycontrol.keys_values(full_size, condition, 3.5, torch.empty(768, device="meta"))

    assert {part.shape for pair in bank.blocks for part in pair} == {(1024, 24, 128)}
    assert len(bank.blocks) == 57
    assert bank.nbytes == 57 * 2 * 1024 * 3072 * 2
