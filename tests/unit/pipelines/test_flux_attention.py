"""FLUX's attention, wider for some rows: conditions, references, and diffusers' own where there are none."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.flux.attention import KeyValues, Reference, WideAttention
from pipelines.flux.sampling import Grid, image_ids

TEXT, GRID = 5, Grid(2, 3)
HEADS, HEAD_DIM, WIDTH = 2, 16, 32

Conditions = Sequence[Sequence[KeyValues]]
References = Sequence[Reference | None]


@pytest.fixture(scope="module")
def transformer(stock: Any) -> Any:
    """A second transformer on the same weights: bits may depend on where those lie in memory."""
    weights = {id(weight): weight for weight in stock.transformer.parameters()}
    return copy.deepcopy(stock.transformer, weights)


@pytest.fixture(scope="module")
def attention(transformer: Any) -> WideAttention:
    return WideAttention(transformer)


@dataclass(frozen=True)
class Rows:
    """A forward's rows."""

    image: Tensor
    text: Tensor
    pooled: Tensor
    time: Tensor

    def only(self, *rows: int) -> "Rows":
        chosen = list(rows)
        return Rows(self.image[chosen], self.text[chosen], self.pooled[chosen], self.time[chosen])


def draw_rows(count: int) -> Rows:
    generator = torch.Generator("cpu").manual_seed(4)
    return Rows(
        torch.randn(count, GRID.tokens, 64, generator=generator),
        torch.randn(count, TEXT, WIDTH, generator=generator),
        torch.randn(count, WIDTH, generator=generator),
        torch.rand(count, generator=generator),
    )


def draw_condition(tokens: int, seed: int = 0) -> KeyValues:
    generator = torch.Generator("cpu").manual_seed(seed)
    size = (tokens, HEADS, HEAD_DIM)
    keys, values = ([torch.randn(size, generator=generator) for _ in range(4)] for _ in ("keys", "values"))
    return KeyValues(tuple(zip(keys, values, strict=True)))


@torch.inference_mode()
def forward(transformer: Any, rows: Rows) -> Tensor:
    velocity: Tensor = transformer(
        hidden_states=rows.image,
        encoder_hidden_states=rows.text,
        pooled_projections=rows.pooled,
        timestep=rows.time,
        guidance=torch.full_like(rows.time, 3.5),
        txt_ids=torch.zeros(TEXT, 3),
        img_ids=image_ids(GRID),
        return_dict=False,
    )[0]
    return velocity


def run(
    transformer: Any,
    attention: WideAttention,
    rows: Rows,
    conditions: Conditions = (),
    references: References = (),
) -> Tensor:
    count = len(rows.image)
    with attention.rows(TEXT, conditions or [()] * count, references or [None] * count):
        return forward(transformer, rows)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def far(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().amax(dim=(-1, -2)).min() > 1e-3)


def test_where_no_row_asks_for_anything_the_bits_are_those_of_diffusers(
    stock: Any, transformer: Any, attention: WideAttention
) -> None:
    rows = draw_rows(3)
    theirs = forward(stock.transformer, rows)
    assert torch.equal(forward(transformer, rows), theirs)
    assert torch.equal(run(transformer, attention, rows), theirs)
    off = [Reference(1, 0.0), None, None]
    assert torch.equal(run(transformer, attention, rows, references=off), theirs)


def test_where_no_row_asks_for_anything_masks_and_fused_projections_work_as_in_diffusers(stock: Any) -> None:
    transformer = copy.deepcopy(stock.transformer)
    attn = transformer.transformer_blocks[0].attn
    image, text = torch.randn(1, 4, WIDTH), torch.randn(1, TEXT, WIDTH)
    mask = torch.rand(TEXT + 4, TEXT + 4) < 0.8
    mask.fill_diagonal_(True)
    transformer.fuse_qkv_projections()
    theirs = attn(image, text, attention_mask=mask)
    with WideAttention(transformer).rows(TEXT, [[]], [Reference(0, 0.0)]):
        ours = attn(image, text, attention_mask=mask)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_what_a_forward_looked_at_is_gone_after_it_even_when_it_failed(
    stock: Any, transformer: Any, attention: WideAttention
) -> None:
    rows, condition = draw_rows(1), draw_condition(3)
    run(transformer, attention, rows, [[condition]])
    with pytest.raises(RuntimeError, match="lost"), attention.rows(TEXT, [[condition]], [None]):
        raise RuntimeError("lost")
    assert torch.equal(forward(transformer, rows), forward(stock.transformer, rows))


def test_a_row_without_wishes_among_others_is_as_under_diffusers(
    stock: Any, transformer: Any, attention: WideAttention
) -> None:
    rows = draw_rows(4)
    ours = run(
        transformer,
        attention,
        rows,
        [[draw_condition(3)], [], [], []],
        [None, None, Reference(3, 1.0), None],
    )
    theirs = forward(stock.transformer, rows)
    close(ours[[1, 3]], theirs[[1, 3]])
    assert far(ours[[0, 2]], theirs[[0, 2]])


def test_conditions_in_any_order_and_joined_to_one_are_the_same(
    transformer: Any, attention: WideAttention
) -> None:
    rows, one, two = draw_rows(1), draw_condition(3, seed=1), draw_condition(4, seed=2)
    joined = KeyValues(
        tuple(
            (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
            for first, second in zip(one.blocks, two.blocks, strict=True)
        )
    )
    both = run(transformer, attention, rows, [[one, two]])
    close(both, run(transformer, attention, rows, [[two, one]]))
    close(both, run(transformer, attention, rows, [[joined]]))
    assert far(both, run(transformer, attention, rows, [[one]]))
    assert joined.nbytes == one.nbytes + two.nbytes == 4 * 2 * 7 * WIDTH * 4


def test_every_module_looks_at_the_keys_and_values_of_its_own(
    transformer: Any, attention: WideAttention
) -> None:
    rows, condition, other = draw_rows(1), draw_condition(3), draw_condition(3, seed=1)
    whole = run(transformer, attention, rows, [[condition]])
    for index in range(4):
        blocks = list(condition.blocks)
        blocks[index] = other.blocks[index]
        assert far(run(transformer, attention, rows, [[KeyValues(tuple(blocks))]]), whole)


@dataclass(frozen=True)
class Module:
    """One attention module with tokens of its own: joined in single blocks, apart in double ones."""

    attn: Any
    tokens: Tensor
    double: bool

    @torch.inference_mode()
    def __call__(self, attention: WideAttention, conditions: Conditions, references: References) -> Tensor:
        """[rows, text + image tokens, width]"""
        text, image = self.tokens[:, :TEXT], self.tokens[:, TEXT:]
        with attention.rows(TEXT, conditions, references):
            parts = self.attn(image, text)[::-1] if self.double else [self.attn(self.tokens)]
            return torch.cat(parts, dim=1)


@pytest.fixture(params=["double", "single"])
def module(request: pytest.FixtureRequest, transformer: Any, attention: WideAttention) -> Module:
    double = request.param == "double"
    block = (transformer.transformer_blocks if double else transformer.single_transformer_blocks)[1]
    generator = torch.Generator("cpu").manual_seed(8)
    return Module(block.attn, torch.randn(3, TEXT + GRID.tokens, WIDTH, generator=generator), double)


def test_a_reference_acts_on_the_image_in_proportion_and_leaves_the_text(
    module: Module, attention: WideAttention
) -> None:
    conditions: Conditions = [[draw_condition(3)], [], []]
    usual = module(attention, conditions, [None] * 3)
    full = module(attention, conditions, [Reference(2, 1.0), None, None]) - usual
    assert full[0, TEXT:].abs().max() > 1e-2
    for strength in (-3.0, -1.0, 0.1, 0.5, 3.0):
        changed = module(attention, conditions, [Reference(2, strength), None, None])
        close(changed[0] - usual[0], strength * full[0])
        close(changed[0, :TEXT], usual[0, :TEXT])
        close(changed[1:], usual[1:])  # the reference row among them


def test_a_reference_in_full_is_its_image_as_a_condition_of_the_image(
    module: Module, attention: WideAttention
) -> None:
    attn, other = module.attn, module.tokens[2, TEXT:]
    with torch.inference_mode():
        key = attn.norm_k(attn.to_k(other).unflatten(-1, (HEADS, HEAD_DIM)))
        value = attn.to_v(other).unflatten(-1, (HEADS, HEAD_DIM))
    shown, more = KeyValues(((key, value),) * 4), draw_condition(3)

    referred = module(attention, [[more], [], []], [Reference(2, 1.0), None, None])

    close(referred[0, TEXT:], module(attention, [[more, shown], [], []], [None] * 3)[0, TEXT:])


def test_a_reference_draws_towards_itself_and_a_negative_one_away(
    transformer: Any, attention: WideAttention
) -> None:
    rows = draw_rows(2)
    usual, pushed, pulled = (
        run(transformer, attention, rows, references=[Reference(1, strength), None])
        for strength in (0.0, -0.01, 0.01)
    )
    close(pulled[1], usual[1])
    cosine = torch.cosine_similarity((pulled - usual)[0].flatten(), (pushed - usual)[0].flatten(), dim=0)
    assert cosine < -0.99


wishes = st.lists(
    st.tuples(
        st.lists(st.sampled_from([1, 2, 3]), max_size=2),  # conditions by their tokens
        st.one_of(st.none(), st.tuples(st.integers(0, 3), st.floats(-3, 3, width=16))),
    ),
    min_size=4,
    max_size=4,
)


@settings(max_examples=30)
@given(wishes)
def test_a_row_is_the_same_alone_and_among_any_others(
    transformer: Any,
    attention: WideAttention,
    wishes: list[tuple[list[int], tuple[int, float] | None]],
) -> None:
    rows = draw_rows(4)
    conditions = [[draw_condition(tokens, seed=tokens) for tokens in each] for each, _ in wishes]
    # as in use, a row that is referred to refers to none
    shown = {wish[0] for _, wish in wishes if wish}
    references = [
        Reference(*wish) if wish and row not in shown else None for row, (_, wish) in enumerate(wishes)
    ]
    together = run(transformer, attention, rows, conditions, references)
    for row, reference in enumerate(references):
        if reference is None:
            alone = run(transformer, attention, rows.only(row), [conditions[row]])
        else:
            pair = [conditions[row], conditions[reference.row]]
            moved = [Reference(1, reference.strength), None]
            alone = run(transformer, attention, rows.only(row, reference.row), pair, moved)
        close(together[row], alone[0])


def test_views_of_other_rows_than_the_forwards_are_a_mistake_of_ours(
    transformer: Any, attention: WideAttention
) -> None:
    with pytest.raises(AssertionError, match="2 rows, views of 1"):
        with attention.rows(TEXT, [[draw_condition(3)]], [None]):
            forward(transformer, draw_rows(2))


def test_the_attention_backend_that_is_set_is_the_one_that_runs(stock: Any) -> None:
    transformer = copy.deepcopy(stock.transformer)
    first, second = (block.attn for block in transformer.transformer_blocks)
    first.set_attention_backend("_native_cudnn")  # before: taken over
    attention = WideAttention(transformer)
    second.set_attention_backend("_native_cudnn")  # after: as with the stock processor
    tokens = torch.randn(1, 4, WIDTH)
    for attn in (first, second):
        for conditions in ([], [draw_condition(3)]):
            with attention.rows(4, [conditions], [None]), torch.inference_mode():
                with pytest.raises((RuntimeError, UserWarning)):  # it runs on NVIDIA's GPUs only
                    attn(tokens, tokens)
    assert torch.isfinite(transformer.single_transformer_blocks[0].attn(tokens)).all()


def test_full_size_rows_go_through_in_their_shapes() -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
        condition = KeyValues(((torch.empty(1024, 24, 128, dtype=torch.bfloat16),) * 2,) * 57)
        image = torch.empty(3, 4096, 64, dtype=torch.bfloat16)
        text = torch.empty(3, 512, 4096, dtype=torch.bfloat16)
        pooled = torch.empty(3, 768, dtype=torch.bfloat16)
    attention = WideAttention(transformer)
    conditions = [[condition, condition], [], []]
    with torch.inference_mode(), attention.rows(512, conditions, [Reference(2, 0.5), None, None]):
        velocity = transformer(
            image, text, pooled, pooled[:, 0], torch.empty(4096, 3), torch.empty(512, 3), pooled[:, 0]
        ).sample
    assert velocity.shape == image.shape
    assert velocity.dtype == torch.bfloat16
