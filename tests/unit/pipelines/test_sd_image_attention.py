"""Rows of one forward look at pictures of their own beside the text, as diffusers' IP-Adapters do alone."""

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.adapters.bank import LoraBank, LoraUse
from pipelines.adapters.lora import Lora, LoraLayer
from pipelines.sd.image_attention import ImageAttention, ImagePrompt, cross_attention
from pipelines.sd.tiles import Tile
from tests.support import sd_ip_adapters
from tests.support.sd_ip_adapters import HEIGHT, WIDTH, Stock, adapter, one_row, predict, seen

SIZE = HEIGHT, WIDTH
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
BASES = ("sd1", "sd2", "sdxl")

unet_of = cache(sd_ip_adapters.base)


@cache
def attention_of(name: str) -> tuple[Any, ImageAttention]:
    unet = deepcopy(unet_of(name))
    return unet, ImageAttention(unet)


def prompt(
    name: str = "sd1", seed: int = 1, tokens: int = 4, scale: float = 1.0, mask: Tensor | None = None
) -> ImagePrompt:
    """Any keys and values."""
    generator = torch.Generator("cpu").manual_seed(seed)
    unet = unet_of(name)
    widths = [unet.get_submodule(module).to_k.out_features for module in cross_attention(unet)]
    pairs = tuple(
        (torch.randn(tokens, width, generator=generator), torch.randn(tokens, width, generator=generator))
        for width in widths
    )
    return ImagePrompt(pairs, (scale,) * len(pairs), mask)


def answer(name: str, inputs: Any, *prompts: list[ImagePrompt], size: tuple[int, int] = SIZE) -> Tensor:
    unet, attention = attention_of(name)
    with attention.rows(prompts, size):
        return predict(unet, inputs)


def a_mask(seed: int = 1, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.rand(1, *size, generator=torch.Generator("cpu").manual_seed(seed))


@pytest.mark.parametrize("name", BASES)
def test_modules_are_numbered_as_diffusers_does(name: str) -> None:
    modules = attention_of(name)[1].modules
    stock = Stock(unet_of(name), adapter("plain", unet_of(name)))
    theirs = [
        name
        for name, each in stock.unet.attn_processors.items()
        if isinstance(each, IPAdapterAttnProcessor2_0)
    ]
    assert [f"{module}.processor" for module in modules] == theirs


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("prompts", ["none", "scale 0"])
def test_where_no_row_asks_diffusers_own_code_runs(name: str, prompts: str) -> None:
    inputs = sd_ip_adapters.inputs(name, rows=2)
    asked = [[], [prompt(name, scale=0)]] if prompts == "scale 0" else [[], []]
    expected = predict(unet_of(name), inputs)
    assert torch.equal(answer(name, inputs, *asked), expected)
    assert torch.equal(predict(attention_of(name)[0], inputs), expected)


def test_a_row_without_prompts_is_as_if_alone() -> None:
    inputs = sd_ip_adapters.inputs("sd1", rows=2)
    ours = answer("sd1", inputs, [], [prompt()])
    torch.testing.assert_close(ours[:1], predict(unet_of("sd1"), one_row(inputs, 0)), **CLOSE)


def test_each_module_has_its_own_scale() -> None:
    """Stock code runs where the scale is 0: as if the value there were of no effect."""
    inputs, whole = sd_ip_adapters.inputs("sdxl", rows=1), prompt("sdxl")
    count = len(whole.pairs)
    scales = tuple(float(index % 3) for index in range(count))
    partly = ImagePrompt(whole.pairs, scales)
    scaled = ImagePrompt(
        tuple((key, value * scale) for (key, value), scale in zip(whole.pairs, scales, strict=True)),
        (1.0,) * count,
    )
    torch.testing.assert_close(answer("sdxl", inputs, [partly]), answer("sdxl", inputs, [scaled]), **CLOSE)


@pytest.mark.parametrize("name", BASES)
def test_masks_are_diffusers(name: str) -> None:
    given = [adapter("plain", unet_of(name), seed) for seed in (1, 2)]
    stock = Stock(unet_of(name), *given)
    stock.scale(0.6, 0.9)
    inputs, masks = sd_ip_adapters.inputs(name, rows=1), [a_mask(1), a_mask(2)]
    embeddings = [seen(seed)[0].embedding for seed in (1, 2)]
    expected = stock.answer(inputs, [each[None, None] for each in embeddings], [mask[None] for mask in masks])

    processors = [
        stock.unet.attn_processors[f"{module}.processor"] for module in cross_attention(unet_of(name))
    ]
    prompts = []
    for index, (scale, mask, embedding) in enumerate(zip((0.6, 0.9), masks, embeddings, strict=True)):
        tokens = stock.projections[index](embedding[None])[0].detach()
        pairs = tuple(
            (each.to_k_ip[index](tokens).detach(), each.to_v_ip[index](tokens).detach())
            for each in processors
        )
        prompts.append(ImagePrompt(pairs, (scale,) * len(pairs), mask))

    torch.testing.assert_close(answer(name, inputs, prompts), expected, **CLOSE)


@pytest.mark.parametrize("size", [SIZE, (6, 10), (7, 5)])
def test_a_white_mask_is_none_and_a_black_one_is_off(size: tuple[int, int]) -> None:
    inputs = sd_ip_adapters.inputs("sdxl", rows=1, size=size)
    white, black = (prompt("sdxl", mask=torch.full((1, *size), value)) for value in (1.0, 0.0))
    torch.testing.assert_close(
        answer("sdxl", inputs, [white], size=size),
        answer("sdxl", inputs, [prompt("sdxl")], size=size),
        **CLOSE,
    )
    expected = predict(unet_of("sdxl"), inputs)
    torch.testing.assert_close(answer("sdxl", inputs, [black], size=size), expected, **CLOSE)


def test_a_mask_acts_where_it_is_white_on_grids_of_odd_sizes_too() -> None:
    """Seen where a module has 2 × 3 queries: diffusers guesses 1 × 6, which shears the mask."""
    size, module = (6, 10), "mid_block.attentions.0.transformer_blocks.0.attn2"
    inputs = sd_ip_adapters.inputs("sdxl", rows=1, size=size)
    mask = torch.zeros(1, *size)
    mask[:, :, :4] = 1
    whole, unet, attention = prompt("sdxl"), *attention_of("sdxl")
    scales = tuple(float(each == module) for each in attention.modules)
    found: list[Tensor] = []
    hook = unet.get_submodule(f"{module}.to_out.0").register_forward_pre_hook(
        lambda _, given: found.append(given[0])
    )
    for mask_or_none in (None, mask):
        answer("sdxl", inputs, [ImagePrompt(whole.pairs, scales, mask_or_none)], size=size)
    answer("sdxl", inputs, [], size=size)
    hook.remove()
    everywhere, masked, off = (each.view(2, 3, -1) for each in found)
    assert torch.allclose(masked[:, 0], everywhere[:, 0], **CLOSE)
    assert torch.allclose(masked[:, 2], off[:, 2], **CLOSE)
    assert not torch.allclose(masked[:, 0], off[:, 0], atol=0.05)


@settings(max_examples=15)
@given(
    rows=st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 3), st.sampled_from([1, 4, 7]), st.sampled_from([0, 0.5, -1]), st.booleans()
            ),
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_row_is_the_same_whatever_its_neighbours_look_at(
    rows: list[list[tuple[int, int, float, bool]]],
) -> None:
    inputs = sd_ip_adapters.inputs("sd1", rows=len(rows))
    prompts = [
        [
            prompt("sd1", seed, tokens, scale, a_mask(seed) if masked else None)
            for seed, tokens, scale, masked in row
        ]
        for row in rows
    ]
    together = answer("sd1", inputs, *prompts)
    for row, asked in enumerate(prompts):
        torch.testing.assert_close(
            together[row : row + 1], answer("sd1", one_row(inputs, row), asked), atol=1e-4, rtol=1e-4
        )


def test_loras_act_on_a_row_that_looks_at_pictures() -> None:
    """Beside every layer of the attention, as if its weights were merged."""
    unet, inputs = deepcopy(unet_of("sd1")), sd_ip_adapters.inputs("sd1", rows=1)
    names = [
        f"{module}.{each}"
        for module in cross_attention(unet)
        for each in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    layers = {name: unet.get_submodule(name) for name in names}
    draw = torch.Generator("cpu").manual_seed(1)
    lora = Lora(
        {
            name: LoraLayer(
                torch.randn(2, layer.in_features, generator=draw) / 4,
                torch.randn(layer.out_features, 2, generator=draw) / 4,
            )
            for name, layer in layers.items()
        }
    )
    merged = deepcopy(unet)
    with torch.no_grad():
        for name, each in lora.layers.items():
            merged.get_submodule(name).weight += each.up @ each.down
    expected_attention, attention, bank = ImageAttention(merged), ImageAttention(unet), LoraBank(layers, 4)
    bank.hold({"a": lora})
    with expected_attention.rows([[prompt()]], SIZE):
        expected = predict(merged, inputs)
    with attention.rows([[prompt()]], SIZE), bank.rows([[LoraUse("a")]]):
        torch.testing.assert_close(predict(unet, inputs), expected, **CLOSE)


class OneModule:
    """As much of a UNet as ImageAttention needs."""

    def __init__(self, attn: Any) -> None:
        self.attn = attn

    @property
    def attn_processors(self) -> dict[str, Any]:
        return {"a.attn2.processor": self.attn.processor}

    def set_attn_processor(self, processors: dict[str, Any]) -> None:
        self.attn.set_processor(processors["a.attn2.processor"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual_connection": True},
        {"rescale_output_factor": 2.0},
        {"norm_num_groups": 4},
        {"cross_attention_norm": "layer_norm"},
        {"upcast_attention": True, "upcast_softmax": True},
        {"bias": True, "out_bias": False},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_the_options_of_diffusers_attention_hold(options: dict[str, Any], masked: bool) -> None:
    """`masked` is the text: some of its tokens are not looked at."""
    draw = torch.Generator("cpu").manual_seed(1)
    attn = Attention(16, 12, heads=2, dim_head=8, **options, processor=AttnProcessor2_0())
    image, text, tokens = (torch.randn(2, *size, generator=draw) for size in ((12, 16), (5, 12), (3, 12)))
    hidden = torch.zeros(2, 1, 5)
    hidden[:, :, 3:] = -10_000
    mask = hidden if masked else None
    stock, processor = deepcopy(attn), IPAdapterAttnProcessor2_0(16, 12, (3,), 0.7)
    stock.set_processor(processor)
    expected = stock(image, (text, [tokens[:, None]]), attention_mask=mask)

    attention = ImageAttention(OneModule(attn))
    to_k, to_v = processor.to_k_ip[0], processor.to_v_ip[0]
    prompts = [[ImagePrompt(((to_k(each), to_v(each)),), (0.7,))] for each in tokens]
    with attention.rows(prompts, (3, 4)):
        ours = attn(image, text, attention_mask=mask)

    torch.testing.assert_close(ours, expected, **CLOSE)
    assert (attn(image, text, attention_mask=mask) - expected).abs().max() > 0.01


@pytest.mark.parametrize("options", [{"qk_norm": "layer_norm"}, {"qk_norm": "rms_norm", "bias": True}])
@torch.inference_mode()
def test_normalised_queries_stay_so(options: dict[str, Any]) -> None:
    """diffusers' IP-Adapters leave these norms out, its usual attention has them: nothing is added here."""
    draw = torch.Generator("cpu").manual_seed(1)
    attn = Attention(16, 12, heads=2, dim_head=8, **options, processor=AttnProcessor2_0())
    image, text = torch.randn(1, 12, 16, generator=draw), torch.randn(1, 5, 12, generator=draw)
    expected = attn(image, text)
    nothing = ImagePrompt(((torch.randn(3, 16, generator=draw), torch.zeros(3, 16)),), (1.0,))
    with ImageAttention(OneModule(attn)).rows([[nothing]], (3, 4)):
        torch.testing.assert_close(attn(image, text), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype) -> None:
    unet = deepcopy(unet_of("sd1")).to(dtype)
    attention = ImageAttention(unet)
    full = prompt(mask=a_mask())
    half = ImagePrompt(
        tuple((key.to(dtype), value.to(dtype)) for key, value in full.pairs), full.scales, full.mask
    )
    inputs = sd_ip_adapters.inputs("sd1", rows=1)
    given = {
        name: each.to(dtype) if isinstance(each, Tensor) and name != "timestep" else each
        for name, each in inputs.items()
    }
    with attention.rows([[half]], SIZE):
        found = predict(unet, given)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), answer("sd1", inputs, [full]), atol=0.1, rtol=0.1)


def test_a_part_of_a_prompt_has_the_part_of_its_mask() -> None:
    mask = a_mask()
    whole = prompt(mask=mask)
    part = whole.cropped(Tile(2, 4, 3, 5))
    assert part.mask is not None and torch.equal(part.mask, mask[:, 2:5, 4:9])
    assert part.pairs is whole.pairs and part.scales == whole.scales
    plain = prompt()
    assert plain.cropped(Tile(2, 4, 3, 5)) is plain


def test_a_prompt_counts_its_bytes() -> None:
    pairs = prompt().pairs
    expected = sum(each.numel() * 4 for pair in pairs for each in pair)
    assert ImagePrompt(pairs, (1.0,) * len(pairs)).nbytes == expected
    assert prompt(mask=a_mask()).nbytes == expected + HEIGHT * WIDTH * 4


def test_an_error_inside_leaves_nothing_behind() -> None:
    unet, attention = attention_of("sd1")
    with pytest.raises(KeyError), attention.rows([[prompt()]], SIZE):
        raise KeyError
    inputs = sd_ip_adapters.inputs("sd1", rows=1)
    assert torch.equal(predict(unet, inputs), predict(unet_of("sd1"), inputs))


def test_what_only_we_can_break_is_asserted() -> None:
    inputs = sd_ip_adapters.inputs("sd1", rows=2)
    with pytest.raises(AssertionError, match="2 rows, prompts for 1"):
        answer("sd1", inputs, [prompt()])
    with pytest.raises(AssertionError, match="made for another UNet"):
        answer("sd1", inputs, [prompt("sdxl")], [])
    with pytest.raises(AssertionError, match="the mask is of another size"):
        answer("sd1", inputs, [prompt(mask=a_mask(size=(4, 4)))], [])
    with pytest.raises(AssertionError, match="no level of latents"):
        small = prompt(mask=a_mask(size=(4, 4)))
        answer("sd1", inputs, [small], [], size=(4, 4))
