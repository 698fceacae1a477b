"""Texts of Stable Diffusion: plain ones are diffusers' to the bit, weighted ones agree with them."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines import zoo
from pipelines.sd.embeddings import TokenEmbedding
from pipelines.sd.parts import Kind, Parts
from pipelines.sd.text import CHUNK, MAX_CHUNKS, WINDOW, Encoding, encode

KINDS: dict[Kind, tuple[str, Any]] = {
    "sd1": ("sd15", StableDiffusionPipeline),
    "sd2": ("sd2", StableDiffusionPipeline),
    "sdxl": ("sdxl", StableDiffusionXLPipeline),
}
LONG = "a very tall house by the sea, " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


def load(kind: Kind, folder: Path) -> Any:
    name, pipeline = KINDS[kind]
    return pipeline.from_pretrained(zoo.locate(name, folder))


def parts_of(kind: Kind, pipe: Any) -> Parts:
    second = kind == "sdxl"
    tokenizers = (pipe.tokenizer, pipe.tokenizer_2) if second else (pipe.tokenizer,)
    encoders = (pipe.text_encoder, pipe.text_encoder_2) if second else (pipe.text_encoder,)
    return Parts(kind, pipe.unet, pipe.vae, tokenizers, encoders, {})


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture(scope="module")
def stock(kind: Kind, folder: Path) -> Any:
    return load(kind, folder)


@pytest.fixture(scope="module")
def parts(kind: Kind, stock: Any) -> Parts:
    return parts_of(kind, stock)


@pytest.fixture(scope="module")
def sdxl(folder: Path) -> Parts:
    return parts_of("sdxl", load("sdxl", folder))


def write(parts: Parts, text: str | None, weighted: bool = True, **options: Any) -> Encoding:
    (encoding,) = encode(parts, [text], weighted=weighted, **options)
    return encoding


@torch.inference_mode()
def stock_encode(pipe: Any, prompt: str, negative: str | None) -> list[Encoding]:
    """What `encode_prompt` of diffusers gives."""
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    tokens = pipe.encode_prompt(prompt, negative_prompt=negative, **arguments)
    if len(tokens) == 2:
        return [Encoding(each[0], None) for each in tokens]
    return [Encoding(tokens[0][0], tokens[2][0]), Encoding(tokens[1][0], tokens[3][0])]


def same(one: Encoding, other: Encoding) -> bool:
    """To the bit."""
    if one.pooled is None or other.pooled is None:
        return torch.equal(one.tokens, other.tokens) and one.pooled is other.pooled
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.pooled, other.pooled)


def chunks(encoding: Encoding) -> list[Tensor]:
    return list(encoding.tokens.view(-1, WINDOW, encoding.tokens.shape[1]))


# plain texts


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a tall house by the sea", "blurry, low quality"),
        ("", ""),
        ("a house", None),
        (LONG, "b" * CHUNK),
        ("(A HOUSE:1.4), [sea]++ \\( BREAK  Ünïcödé 🏠\n<|endoftext|> more", LONG),
    ],
)
def test_a_plain_text_is_diffusers_to_the_bit(
    stock: Any, parts: Parts, prompt: str, negative: str | None
) -> None:
    encoded = encode(parts, [prompt, negative], weighted=False)
    for ours, theirs in zip(encoded, stock_encode(stock, prompt, negative), strict=True):
        assert same(ours, theirs)


def test_only_sdxl_has_a_pooled_vector_and_zeros_for_an_absent_text(kind: Kind, parts: Parts) -> None:
    absent, empty = encode(parts, [None, ""], weighted=False)
    assert (absent.pooled is not None) == (kind == "sdxl")
    if absent.pooled is None:
        assert same(absent, empty)
    else:
        assert not absent.tokens.any() and not absent.pooled.any()
        assert empty.tokens.any()


def test_an_absent_text_is_as_long_as_the_others(sdxl: Parts) -> None:
    prompt, absent = encode(sdxl, [LONG, None], weighted=True)
    assert absent.tokens.shape == prompt.tokens.shape
    assert not absent.tokens.any()


def test_a_text_is_the_same_beside_others(parts: Parts) -> None:
    texts = ["a house", LONG, "b" * 300]
    together = encode(parts, texts, weighted=True)
    for text, encoding in zip(texts, together, strict=True):
        alone = write(parts, text)
        assert torch.equal(encoding.tokens[: len(alone.tokens)], alone.tokens)


# weighted texts

WORDS = st.lists(st.sampled_from(["a", "house", "by", "the", "sea,", "3", "é"]), max_size=9).map(" ".join)


@given(WORDS)
@settings(max_examples=20)
def test_text_without_weights_is_plain(sdxl: Parts, text: str) -> None:
    assert same(write(sdxl, text), write(sdxl, text, weighted=False))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("(a house:1) by the sea", "a house by the sea"),
        ("a (house)1.0", "a house"),
        ("a ((house:2):0.5) by", "a house by"),
        (r"a \(house\)", "a (house)"),
        ("BREAK a house BREAK", "a house"),
    ],
)
def test_a_weight_of_one_is_none(parts: Parts, text: str, plain: str) -> None:
    assert same(write(parts, text), write(parts, plain, weighted=False))


def test_a_weight_scales_its_tokens_against_the_others(parts: Parts) -> None:
    plain, weighed = write(parts, "a b c"), write(parts, "a (b:1.5) c")
    ratio = (weighed.tokens / plain.tokens).median(dim=1).values
    others = torch.cat([ratio[:2], ratio[3:]])
    torch.testing.assert_close(others, others[:1].expand(len(others)))
    torch.testing.assert_close(ratio[2], 1.5 * others[0])


def test_weights_keep_the_mean_magnitude_of_chunk_and_encoder(sdxl: Parts) -> None:
    plain, weighed = write(sdxl, "a b c " * 40), write(sdxl, "(a:1.6) [b] (c:0.3) " * 40)
    width = sdxl.text_encoders[0].config.hidden_size
    assert len(plain.tokens) == len(weighed.tokens) == 2 * WINDOW
    for one, other in zip(chunks(plain), chunks(weighed), strict=True):
        assert not torch.equal(one, other)
        for columns in (slice(width), slice(width, None)):
            torch.testing.assert_close(one[:, columns].abs().mean(), other[:, columns].abs().mean())


def test_weights_leave_the_pooled_vector_alone(sdxl: Parts) -> None:
    plain, weighed = write(sdxl, "a house"), write(sdxl, "a (house:1.7)")
    assert plain.pooled is not None and weighed.pooled is not None
    assert torch.equal(plain.pooled, weighed.pooled)
    assert not torch.equal(plain.tokens, weighed.tokens)


def test_zero_takes_a_word_out_and_nothing_breaks(parts: Parts) -> None:
    encoding = write(parts, "(a house:0)")
    assert encoding.tokens.isfinite().all()
    assert not encoding.tokens[1:7].any()


def words(changed: int | None = None) -> str:
    return " ".join("b" if number == changed else "a" for number in range(200))


def test_long_texts_are_read_to_their_end(parts: Parts) -> None:
    text, other = write(parts, words()), write(parts, words(changed=150))
    assert len(text.tokens) == 3 * WINDOW
    equal = [torch.equal(one, another) for one, another in zip(chunks(text), chunks(other), strict=True)]
    assert equal == [True, True, False]
    if text.pooled is not None and other.pooled is not None:
        assert torch.equal(text.pooled, other.pooled)  # the first chunk's


def test_a_long_text_is_its_chunks_one_after_the_other(parts: Parts) -> None:
    pieces = ["a" * CHUNK, "b" * CHUNK, "c" * 10]
    long = write(parts, " ".join(" ".join(piece) for piece in pieces))
    for chunk, piece in zip(chunks(long), pieces, strict=True):
        assert torch.equal(chunk, write(parts, " ".join(piece), weighted=False).tokens)


def test_break_begins_a_chunk(parts: Parts) -> None:
    parted = write(parts, "BREAK a house BREAK BREAK by the sea")
    first, second = chunks(parted)
    assert torch.equal(first, write(parts, "a house").tokens)
    assert torch.equal(second, write(parts, "by the sea").tokens)


def test_the_shorter_text_is_padded_with_empty_chunks(parts: Parts) -> None:
    prompt, negative = encode(parts, [words(), "blurry"], weighted=True)
    assert len(prompt.tokens) == len(negative.tokens) == 3 * WINDOW
    first, *rest = chunks(negative)
    assert torch.equal(first, write(parts, "blurry").tokens)
    assert all(torch.equal(chunk, write(parts, "").tokens) for chunk in rest)


@pytest.mark.parametrize("beyond", ["a " * 10_000, "a BREAK " * 100, "(a:1.1)b" * 1500])
def test_what_exceeds_the_bound_is_cut(sdxl: Parts, beyond: str) -> None:
    assert len(write(sdxl, beyond).tokens) == MAX_CHUNKS * WINDOW


# clip_skip


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_clip_skip_is_an_encoder_without_its_last_layers(
    kind: Kind, parts: Parts, skip: int, weighted: bool
) -> None:
    skipped = write(parts, "a (house)", weighted, clip_skip=skip)
    shorter = write(without_layers(parts, skip), "a (house)", weighted)
    assert torch.equal(skipped.tokens, shorter.tokens)
    whole = write(parts, "a (house)", weighted)
    assert torch.equal(skipped.tokens, whole.tokens) == (skip == 0)
    if whole.pooled is not None and skipped.pooled is not None:
        assert torch.equal(skipped.pooled, whole.pooled)


def again(parts: Parts) -> Parts:
    """Encoders to change, with the same parameters."""
    parameters = [each for encoder in parts.text_encoders for each in encoder.parameters()]
    encoders = copy.deepcopy(parts.text_encoders, {id(each): each for each in parameters})
    return replace(parts, text_encoders=encoders)


def without_layers(parts: Parts, count: int) -> Parts:
    shorter = again(parts)
    for encoder in shorter.text_encoders:
        layers = getattr(encoder, "text_model", encoder).encoder.layers
        del layers[len(layers) - count :]
        encoder.config.num_hidden_layers = len(layers)
    return shorter


def test_sdxls_clip_skip_of_the_prompt_is_diffusers(folder: Path) -> None:
    pipe = load("sdxl", folder)
    with torch.inference_mode():
        tokens, _, pooled, _ = pipe.encode_prompt("a house", device="cpu", clip_skip=1)
    ours = write(parts_of("sdxl", pipe), "a house", weighted=False, clip_skip=1)
    assert same(ours, Encoding(tokens[0], pooled[0]))


# words of one's own


def drawn(parts: Parts, token: str, count: int = 1, seed: int = 0) -> TokenEmbedding:
    generator = torch.Generator("cpu").manual_seed(seed)
    widths = [encoder.config.hidden_size for encoder in parts.text_encoders]
    return TokenEmbedding(token, tuple(torch.randn(count, width, generator=generator) for width in widths))


def meaning(parts: Parts, token: str, letters: str) -> TokenEmbedding:
    """A word with the vectors of one-letter words."""
    vectors = []
    for tokenizer, encoder in zip(parts.tokenizers, parts.text_encoders, strict=True):
        ids = tokenizer(" ".join(letters), add_special_tokens=False).input_ids
        vectors.append(encoder.get_input_embeddings().weight[ids].detach().clone())
    return TokenEmbedding(token, tuple(vectors))


def teach(pipe: Any, embeddings: Sequence[TokenEmbedding]) -> None:
    """By diffusers."""
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if hasattr(pipe, "tokenizer_2"):
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    for number, (tokenizer, encoder) in enumerate(pairs):
        for each in embeddings:
            pipe.load_textual_inversion(
                each.vectors[number], token=each.token, tokenizer=tokenizer, text_encoder=encoder
            )


@pytest.mark.parametrize(
    "text",
    [
        "a <s0> by <s1>",
        "<s0><s1> house<s0>, <S1>",
        "nothing new",
        "a " * 74 + "<s1> house",  # cut within its vectors
        "a " * 75 + "<s1>",
    ],
)
def test_taught_words_are_diffusers_to_the_bit(kind: Kind, folder: Path, text: str) -> None:
    pipe = load(kind, folder)
    parts = parts_of(kind, load(kind, folder))
    embeddings = [drawn(parts, "<s0>"), drawn(parts, "<s1>", count=3, seed=1)]
    teach(pipe, embeddings)
    ours = encode(parts, [text, "<s0> bad"], weighted=False, embeddings=embeddings)
    for one, other in zip(ours, stock_encode(pipe, text.replace("<S1>", "<s1>"), "<s0> bad"), strict=True):
        assert same(one, other)


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("a <word> b", "a x y b"),
        ("a (<WORD>:1.4) b", "a (x y:1.4) b"),
        ("(a <word> b)++ c", "(a x y b)++ c"),
        ("a <word>-- b", "a (x y)-- b"),
        ("a <word><word>", "a x y x y"),
    ],
)
def test_a_word_taught_another_ones_vectors_reads_like_it(parts: Parts, text: str, spelled: str) -> None:
    word = meaning(parts, "<word>", "xy")
    assert same(write(parts, text, embeddings=[word]), write(parts, spelled))
    assert not same(write(parts, text), write(parts, spelled))


def test_the_longest_word_is_found(parts: Parts) -> None:
    taught = [meaning(parts, "new", "x"), meaning(parts, "newer", "y"), meaning(parts, "ew", "z")]
    for order in (taught, taught[::-1]):
        assert same(write(parts, "a newer new", embeddings=order), write(parts, "a y x"))


def test_a_words_vectors_stay_in_one_chunk(sdxl: Parts) -> None:
    word = meaning(sdxl, "<word>", "xyz")
    parted = write(sdxl, "a " * 73 + "<word>", embeddings=[word])
    assert same(parted, write(sdxl, "a " * 73 + "BREAK x y z"))


def test_a_taught_word_does_not_draw_the_pooled_vector(sdxl: Parts) -> None:
    """Encoders whose config has the end token wrong look for the highest id instead, as SDXL's do."""
    old, word = again(sdxl), drawn(sdxl, "<word>", count=4)
    for encoder in old.text_encoders:
        getattr(encoder, "text_model", encoder).eos_token_id = 2
    one, other = (write(parts, "a <word> here", embeddings=[word]) for parts in (sdxl, old))
    assert same(one, other)


def test_nothing_taught_is_left_behind(kind: Kind, folder: Path) -> None:
    parts = parts_of(kind, load(kind, folder))
    encoder = parts.text_encoders[-1]
    before = copy.deepcopy(encoder.state_dict())
    sizes, plain = [len(tokenizer) for tokenizer in parts.tokenizers], write(parts, "a <s0> b")
    taught = write(parts, "a <s0> b", embeddings=[drawn(parts, "<s0>")])

    failing = encoder.get_input_embeddings().register_forward_hook(fail)
    with suppress(Interrupted):
        write(parts, "a <s0> b", embeddings=[drawn(parts, "<s0>")])
    failing.remove()

    assert not same(taught, plain)
    assert same(write(parts, "a <s0> b"), plain)
    assert sizes == [len(tokenizer) for tokenizer in parts.tokenizers]
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not encoder.get_input_embeddings()._forward_hooks


class Interrupted(Exception):
    """What goes wrong amid a forward."""


def fail(*_: Any) -> None:
    raise Interrupted


# the encoders as they are


def test_hooks_on_the_layers_act(parts: Parts) -> None:
    """LoRAs are such hooks; here, one that is the same as a bias."""
    biased = copy.deepcopy(parts)
    plain = write(parts, "a (house:1.2)")
    hooks = []
    for one, other in zip(parts.text_encoders, biased.text_encoders, strict=True):
        linear, same_linear = (first_linear(encoder) for encoder in (one, other))
        with torch.no_grad():
            same_linear.bias += 0.5
        hooks.append(linear.register_forward_hook(lambda module, inputs, output: output + 0.5))
    hooked = write(parts, "a (house:1.2)")
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(hooked.tokens, write(biased, "a (house:1.2)").tokens)
    assert not torch.allclose(hooked.tokens, plain.tokens, atol=1e-3)


def first_linear(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder).encoder.layers[0].mlp.fc1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_encoders_dtype_is_kept(sdxl: Parts, dtype: torch.dtype) -> None:
    narrow = copy.deepcopy(sdxl)
    for encoder in narrow.text_encoders:
        encoder.to(dtype)
    text, word = "a (house:1.5) <s0> BREAK by", drawn(sdxl, "<s0>")
    encoding, exact = (write(parts, text, embeddings=[word]) for parts in (narrow, sdxl))
    assert encoding.pooled is not None and exact.pooled is not None
    assert encoding.tokens.dtype == encoding.pooled.dtype == dtype
    torch.testing.assert_close(encoding.tokens.float(), exact.tokens, atol=0.05, rtol=0.05)
    torch.testing.assert_close(encoding.pooled.float(), exact.pooled, atol=0.05, rtol=0.05)
