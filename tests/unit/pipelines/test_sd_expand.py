"""Prompts written on: the prompt stays, the addition fits, and the seed decides."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, CLIPTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from pipelines import zoo
from pipelines.sd import expand
from pipelines.sd.expand import WINDOW, Expander

END, SPECIAL = "<|endoftext|>", "<|secret|>"
PROMPT = "a house by the sea"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with a token for each byte."""
    folder = tmp_path_factory.mktemp("gpt2")
    pieces = [*sorted(ByteLevel.alphabet()), END]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = GPT2Tokenizer(vocabulary, merges=[], additional_special_tokens=[SPECIAL])
    config = GPT2Config(
        vocab_size=len(tokenizer) + 3,  # tables are rounded up
        n_positions=180,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,  # so that what was read before decides what comes next
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = zoo.locate("sdxl", tmp_path_factory.mktemp("zoo"))
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def expander(folder: Path, clip: Any) -> Expander:
    return Expander.load(folder, "cpu", clip)


@pytest.fixture
def writing(folder: Path, clip: Any, tmp_path: Path) -> Callable[..., Expander]:
    """An expander whose model writes these tokens, one as often as the other, and nothing else."""

    def writing(*tokens: str) -> Expander:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = GPT2LMHeadModel.from_pretrained(folder)
        ids = tokenizer.convert_tokens_to_ids([*tokens])
        with torch.no_grad():
            table, last = model.transformer.wte.weight, model.transformer.ln_f
            table.zero_()
            table[ids, 0] = 1
            last.weight.zero_()
            last.bias.copy_(1000 * table[ids[0]])  # the score of a token is its row times this
        return Expander(model, tokenizer, clip)

    return writing


def clip_tokens(clip: Any, text: str) -> int:
    return len(clip(text, truncation=True, max_length=1000).input_ids)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=90)


@given(prompt=TEXTS, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_the_prompt_stays_and_the_addition_fits(
    expander: Expander, clip: Any, prompt: str, seed: int
) -> None:
    expanded = expander.expand(prompt, seed)
    added = expanded.removeprefix(prompt)
    assert expanded == prompt + added
    assert added == "" or clip_tokens(clip, expanded) <= WINDOW
    assert not any(unicodedata.category(character) == "Cc" for character in added)
    assert len(added.splitlines()) < 2
    assert not {"\ufffd", END, SPECIAL} & {added, *added}


def test_the_seed_decides(expander: Expander) -> None:
    texts = [expander.expand(PROMPT, seed) for seed in (1, 2, 3, 1, 2, 3)]
    assert texts[:3] == texts[3:]
    assert len(set(texts)) == 3


def test_the_prompt_decides_too(expander: Expander) -> None:
    additions = {expander.expand(prompt, 2).removeprefix(prompt) for prompt in (PROMPT, "ice", "")}
    assert len(additions) == 3


def test_other_random_numbers_are_left_alone(expander: Expander) -> None:
    before = torch.random.get_rng_state()
    first = expander.expand(PROMPT, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert expander.expand(PROMPT, 1) == first


def test_the_window_is_filled(writing: Callable[..., Expander], clip: Any) -> None:
    expanded = writing("x").expand(PROMPT, 0)
    assert set(expanded.removeprefix(PROMPT)) == {"x"}
    assert clip_tokens(clip, expanded) == WINDOW


def test_a_prompt_that_fills_the_window_stays_alone(writing: Callable[..., Expander]) -> None:
    for count in (WINDOW - 2, WINDOW - 1, 5000):
        assert writing("x").expand("a" * count, 0) == "a" * count
    assert writing("x").expand("a" * (WINDOW - 3), 0) == "a" * (WINDOW - 3) + "x"


@pytest.mark.parametrize("last", [END, "Ċ"])
def test_the_addition_ends_where_the_model_ends_it(
    writing: Callable[..., Expander], folder: Path, last: str
) -> None:
    assert writing(last).expand(PROMPT, 0) == PROMPT
    tokenizer, brief = AutoTokenizer.from_pretrained(folder), writing("x", "Ġ", last)
    for seed in range(9):
        tokens = tokenizer.convert_ids_to_tokens([*brief._sampled(tokenizer(PROMPT).input_ids, seed)])
        line = tokens[: tokens.index(last)]
        assert brief.expand(PROMPT, seed) == PROMPT + "".join(line).replace("Ġ", " ")


def test_special_tokens_are_not_written(writing: Callable[..., Expander]) -> None:
    assert set(writing(SPECIAL, "x").expand(PROMPT, 0).removeprefix(PROMPT)) == {"x"}


@pytest.mark.parametrize(("limit", "prompt"), [("WINDOW", PROMPT + "," * 40), ("_MOST_NEW", PROMPT)])
def test_what_does_not_fit_is_cut_between_words(
    writing: Callable[..., Expander], monkeypatch: pytest.MonkeyPatch, limit: str, prompt: str
) -> None:
    wordy = writing("x", "Ġ")
    cut = [wordy.expand(prompt, seed) for seed in range(4)]
    monkeypatch.setattr(expand, limit, getattr(expand, limit) + 10)
    longer = [wordy.expand(prompt, seed) for seed in range(4)]
    assert all(more.startswith(f"{text} ") for text, more in zip(cut, longer, strict=True))


def test_the_likeliest_tokens_are_those_of_transformers(
    expander: Expander, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered of earlier tokens is right."""
    monkeypatch.setattr(expand, "_TOP_K", 1)
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        for _ in range(40):
            logits = model(ids, use_cache=False).logits[0, -1, :257]
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    sampled = [*expander._sampled(tokenizer(PROMPT).input_ids, 0)]
    assert sampled[:40] == ids[0, len(PROMPT) :].tolist()


def test_the_model_reads_the_end_of_a_prompt_that_is_long_to_it(expander: Expander) -> None:
    """Spaces are nothing to CLIP, and fill this model's positions."""
    prompts = [first + " " * 200 + last for first in "ab" for last in "ab"]
    added = [expander.expand(prompt, 1).removeprefix(prompt) for prompt in prompts]
    assert added[0] == added[2] != added[1] == added[3]


def test_a_folder_of_pickles_is_not_loaded(folder: Path, clip: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Expander.load(tmp_path, "cpu", clip)
