"""IP-Adapters of every kind change a UNet's answer as diffusers' own loading of the same file does."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from pipelines.adapters.bank import LoraBank, LoraUse
from pipelines.sd.image_attention import ImageAttention, ImagePrompt, cross_attention
from pipelines.sd.image_encoder import ImageFeatures
from pipelines.sd.ip_adapter import IpAdapter, IpAdapterKind, scales_of
from pipelines.sd.ip_adapter_file import load
from pipelines.sd.lora_keys import targets
from schemas.errors import AssetError
from tests.support import sd_ip_adapters
from tests.support.sd_ip_adapters import HEIGHT, WIDTH, Stock, adapter, predict, seen, write

KINDS: tuple[IpAdapterKind, ...] = get_args(IpAdapterKind)
BASES = ("sd1", "sd2", "sdxl")
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
Load = Callable[..., IpAdapter]

unet_of = cache(sd_ip_adapters.base)


@cache
def attention_of(name: str) -> tuple[Any, ImageAttention]:
    """A UNet, and our attention in it."""
    unet = deepcopy(unet_of(name))
    return unet, ImageAttention(unet)


@pytest.fixture
def loaded(tmp_path: Path) -> Load:
    def loaded(kind: IpAdapterKind, name: str = "sd1", seed: int = 1, **more: Any) -> IpAdapter:
        path = write(tmp_path / "adapter", adapter(kind, unet_of(name), seed, **more))
        return load(path, unet_of(name))

    return loaded


def read(kind: IpAdapterKind, picture: tuple[ImageFeatures, Tensor]) -> Tensor:
    """What diffusers passes as image_embeds of one picture."""
    image, face = picture
    match kind:
        case "plain":
            return image.embedding
        case "full" | "plus":
            return image.hidden
        case "instantid":
            return face[None]
        case "faceid" | "faceid_plus":
            return face


def prompt_of(
    found: IpAdapter, tokens: Tensor, scale: float = 1.0, mask: Tensor | None = None
) -> ImagePrompt:
    return ImagePrompt(found.pairs(tokens), (scale,) * len(found.weights), mask)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_acts_as_in_diffusers(kind: IpAdapterKind, name: str, loaded: Load) -> None:
    stock = Stock(unet_of(name), adapter(kind, unet_of(name), lora=False))
    found = loaded(kind, name, lora=False)
    assert found.kind == kind and found.lora is None
    pictures = [seen(5), seen(6)]
    if kind == "faceid_plus":
        stock.projections[0].clip_embeds = torch.stack([image.hidden[None] for image, _ in pictures])
        stock.projections[0].shortcut = True
    inputs = sd_ip_adapters.inputs(name, rows=2)
    stock.scale(0.7)
    expected = stock.answer(inputs, [torch.stack([read(kind, each)[None] for each in pictures])])

    unet, attention = attention_of(name)
    prompts = [[prompt_of(found, found.tokens(*each), 0.7)] for each in pictures]
    with attention.rows(prompts, (HEIGHT, WIDTH)):
        ours = predict(unet, inputs)

    torch.testing.assert_close(ours, expected, **CLOSE)
    assert (ours - predict(unet, inputs)).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_several_pictures_of_one_adapter_act_as_in_diffusers(kind: IpAdapterKind, loaded: Load) -> None:
    stock = Stock(unet_of("sd1"), adapter(kind, unet_of("sd1"), lora=False))
    found, pictures = loaded(kind, lora=False), [seen(5), seen(6), seen(7)]
    if kind == "faceid_plus":
        stock.projections[0].clip_embeds = torch.stack([image.hidden for image, _ in pictures])[None]
        stock.projections[0].shortcut = True
    inputs = sd_ip_adapters.inputs("sd1", rows=1)
    expected = stock.answer(inputs, [torch.stack([read(kind, each) for each in pictures])[None]])

    unet, attention = attention_of("sd1")
    tokens = torch.cat([found.tokens(*each) for each in pictures])
    with attention.rows([[prompt_of(found, tokens)]], (HEIGHT, WIDTH)):
        torch.testing.assert_close(predict(unet, inputs), expected, **CLOSE)


@pytest.mark.parametrize("shortcut", [False, True])
def test_both_versions_of_faceid_plus_are_diffusers(shortcut: bool, loaded: Load) -> None:
    projection = Stock(unet_of("sd1"), adapter("faceid_plus", unet_of("sd1"))).projections[0]
    image, face = seen()
    projection.clip_embeds, projection.shortcut = image.hidden[None, None], shortcut
    tokens = loaded("faceid_plus").tokens(image, face, shortcut=shortcut)
    torch.testing.assert_close(tokens, projection(face[None])[0].detach(), **CLOSE)


def test_threads_do_not_see_each_others_pictures(loaded: Load) -> None:
    found, pictures = loaded("faceid_plus"), [seen(seed) for seed in range(8)]
    alone = [found.tokens(*each, shortcut=index % 2 == 0) for index, each in enumerate(pictures)]
    jobs = [index % len(pictures) for index in range(64)]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda index: found.tokens(*pictures[index], shortcut=index % 2 == 0), jobs)
        for index, tokens in zip(jobs, together, strict=True):
            assert torch.equal(tokens, alone[index])
    assert found.projection.clip_embeds is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_unconditional_row_sees_no_face_and_what_it_is_given(kind: IpAdapterKind, loaded: Load) -> None:
    found, (image, face) = loaded(kind), seen()
    expected = found.tokens(image, torch.zeros_like(face))
    assert torch.equal(found.negative_tokens(image), expected)
    assert found.negative_tokens(image).isfinite().all()


def test_tokens_that_are_there_twice_change_nothing(loaded: Load) -> None:
    """So one unconditional picture stands for any number."""
    found, inputs = loaded("plus"), sd_ip_adapters.inputs("sd1", rows=2)
    unet, attention = attention_of("sd1")
    tokens = found.tokens(seen()[0])
    prompts = [[prompt_of(found, torch.cat([tokens] * count))] for count in (1, 3)]
    with attention.rows(prompts, (HEIGHT, WIDTH)):
        twice = predict(
            unet,
            {
                **inputs,
                "sample": inputs["sample"][:1].repeat(2, 1, 1, 1),
                "timestep": inputs["timestep"][:1].repeat(2),
                "encoder_hidden_states": inputs["encoder_hidden_states"][:1].repeat(2, 1, 1),
            },
        )
    torch.testing.assert_close(twice[0], twice[1], **CLOSE)


READS = {
    "plain": (20, None, None, True, True),
    "full": (None, 28, None, True, True),
    "plus": (None, 28, None, True, True),
    "faceid": (None, None, 512, True, False),
    "faceid_plus": (None, 28, 512, True, True),
    "instantid": (None, None, 512, False, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_says_what_it_reads(kind: IpAdapterKind, loaded: Load) -> None:
    reads = loaded(kind).reads
    assert (reads.embedding, reads.hidden, reads.face, reads.normed_face, reads.clip) == READS[kind]


@pytest.mark.parametrize(
    ("kind", "what"), [("plain", "image embeddings 20 wide"), ("plus", "hidden states 28 wide")]
)
def test_another_image_encoder_is_refused(kind: IpAdapterKind, what: str, loaded: Load) -> None:
    image = ImageFeatures(torch.zeros(21), torch.zeros(17, 30))
    with pytest.raises(AssetError, match=what) as caught:
        loaded(kind).tokens(image)
    assert caught.value.kind == "invalid_weights"


@pytest.mark.parametrize("kind", ["faceid", "faceid_plus"])
def test_faceids_lora_is_diffusers(kind: IpAdapterKind, loaded: Load) -> None:
    unet, found = deepcopy(unet_of("sd1")), loaded(kind)
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=deepcopy(unet), scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    given = sd_ip_adapters.nested(adapter(kind, unet_of("sd1")))
    pipe.load_ip_adapter(given, subfolder="", weight_name="", image_encoder_folder=None)
    image, face = seen()
    if kind == "faceid_plus":
        projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        projection.clip_embeds, projection.shortcut = image.hidden[None, None], True
    inputs = sd_ip_adapters.inputs("sd1", rows=1)
    expected = predict(pipe.unet, {**inputs, "added_cond_kwargs": {"image_embeds": [face[None, None]]}})

    assert found.lora is not None
    layers = {name: unet.get_submodule(name.removeprefix("unet.")) for name in targets(unet, [])}
    assert found.lora.layers.keys() <= layers.keys()
    bank, attention = LoraBank(layers, 8), ImageAttention(unet)
    bank.hold({"face": found.lora})
    prompt = prompt_of(found, found.tokens(image, face))
    with attention.rows([[prompt]], (HEIGHT, WIDTH)):
        without = predict(unet, inputs)
        with bank.rows([[LoraUse("face")]]):
            ours = predict(unet, inputs)

    torch.testing.assert_close(ours, expected, **CLOSE)
    assert (without - expected).abs().max() > 0.01


def test_two_adapters_act_as_in_diffusers(loaded: Load) -> None:
    kinds: tuple[IpAdapterKind, IpAdapterKind] = ("plain", "plus")
    stock = Stock(unet_of("sdxl"), *(adapter(kind, unet_of("sdxl"), seed) for seed, kind in enumerate(kinds)))
    founds = [loaded(kind, "sdxl", seed) for seed, kind in enumerate(kinds)]
    inputs = sd_ip_adapters.inputs("sdxl", rows=1)
    stock.scale(0.4, 0.9)
    pictures = [seen(5), seen(6)]
    expected = stock.answer(inputs, [read(*each)[None, None] for each in zip(kinds, pictures, strict=True)])

    unet, attention = attention_of("sdxl")
    prompts = [
        prompt_of(found, found.tokens(*picture), scale)
        for found, picture, scale in zip(founds, pictures, (0.4, 0.9), strict=True)
    ]
    with attention.rows([prompts], (HEIGHT, WIDTH)):
        torch.testing.assert_close(predict(unet, inputs), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_kept_as_its_unet_is(kind: IpAdapterKind, dtype: torch.dtype, tmp_path: Path) -> None:
    unet = deepcopy(unet_of("sd1")).to(dtype)
    tensors = adapter(kind, unet)
    found = load(write(tmp_path / "a", tensors), unet)
    tokens = found.tokens(*seen())
    pairs = found.pairs(tokens)
    assert {each.dtype for pair in pairs for each in pair} | {tokens.dtype} == {dtype}
    own = sum(each.numel() for name, each in tensors.items() if "_lora" not in name)
    assert found.nbytes == own * dtype.itemsize


SD1_JSON: list[dict[str, Any]] = [
    {"down": 0.5},
    {"mid": 0.25},
    {"mid": [0.25]},
    {"up": 1},
    {"down": 0.5, "mid": 2, "up": -1.0},
    {"down": {"block_0": [0.5, 0.25]}},
    {"down": {"block_0": [0.5]}, "up": {"block_1": [0.1, 0.2, 0.3]}},
    {"up": [0.1, 0.2, 0.3]},
    {"down": [0.1, 0.2], "up": {"block_1": 0.7}},
    {"up": {}},
]
SDXL_JSON: list[dict[str, Any]] = [
    {"up": {"block_0": [0.0, 1.0, 0.0]}},
    {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
    {"down": {"block_1": 0.3, "block_2": [0.5, 0.6]}, "mid": 0.9, "up": [0.1, 0.2, 0.3]},
]


@pytest.mark.parametrize(
    ("name", "wish"), [("sd1", each) for each in SD1_JSON] + [("sdxl", each) for each in SDXL_JSON]
)
def test_scales_by_place_are_diffusers(name: str, wish: dict[str, Any]) -> None:
    stock = Stock(unet_of(name), adapter("plain", unet_of(name)))
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=stock.unet, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_ip_adapter_scale(wish)
    processors = stock.unet.attn_processors.values()
    expected = tuple(each.scale[0] for each in processors if hasattr(each, "scale"))
    assert scales_of(0.9, wish, cross_attention(unet_of(name))) == expected


def test_without_places_the_scale_is_everywhere() -> None:
    modules = cross_attention(unet_of("sdxl"))
    assert scales_of(0.9, {}, modules) == (0.9,) * len(modules)


@pytest.mark.parametrize(
    ("wish", "fault"),
    [
        ({"downs": 1}, "scale_json has no downs; there are down, mid, up"),
        ({"down": {"block_1": 1}}, "scale_json.down has no block_1; there are block_0"),
        ({"down": {"block_0": [1, 2, 3]}}, "scale_json.down.block_0 has 3 numbers for 2 attentions"),
        ({"up": {"block_1": []}}, "scale_json.up.block_1 has 0 numbers for 3 attentions"),
        ({"down": [1, 2, 3]}, "scale_json.down has 3 numbers for 2 attentions"),
        ({"mid": [1, 2]}, "scale_json.mid has 2 numbers for 1 attentions"),
        ({"mid": {"block_0": 1}}, "scale_json.mid is not a number from -100 to 100"),
        ({"up": "much"}, "scale_json.up is not a number from -100 to 100"),
        ({"up": True}, "scale_json.up is not a number from -100 to 100"),
        ({"up": None}, "scale_json.up is not a number from -100 to 100"),
        ({"up": float("nan")}, "scale_json.up is not a number from -100 to 100"),
        ({"up": 10**400}, "scale_json.up is not a number from -100 to 100"),
        ({"up": {"block_1": [[1.0], 1, 1]}}, "scale_json.up.block_1 is not a number from -100 to 100"),
    ],
)
def test_scales_that_fit_no_place_are_refused(wish: dict[str, Any], fault: str) -> None:
    with pytest.raises(AssetError, match=fault) as caught:
        scales_of(1.0, wish, cross_attention(unet_of("sd1")))
    assert caught.value.kind == "invalid_scale"
