"""No text, however it is made, keeps a parser busy for long."""

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from deployments.files import fetch, guard, origins, store
from deployments.gateway import addresses, body, downloads, openai, uploads
from pipelines.registry import ENDPOINTS, endpoint
from pipelines.sd import prompt
from pipelines.sd.embeddings import _TOKEN, TokenEmbedding
from pipelines.sd.text import _any_of
from pipelines.sd.vocabulary import openai as openai_vocabulary
from schemas.endpoints import lora_image_to_image as universal
from schemas.errors import DarkroomError
from schemas.fields import Variant
from schemas.settings import ReachSettings

LENGTH = 100_000
MOST_PROMPT = 32_768  # characters of a prompt; no longer one gets beyond the gateway

# the heads and tails that make a pattern which looks twice look often
PIECES = [
    "a", " ", "(", ")", "[(", "(a:1", "+", "a+", "\\", "\\(", "BREAK ", "a.", "-", "/", "./", "%41", "@", ":",
    "<s0>", "é", "İ", "a" * 63 + "y",
]  # fmt: skip
STRINGS = [(piece * LENGTH)[:LENGTH] + "\x7f" for piece in PIECES]
STRINGS += [
    "data:image/png;base64," + "A" * LENGTH,
    "http://" + "a." * (LENGTH // 2),
    "(" * 50_000 + ")" * 50_000,
]

# words that all begin alike: what an alternation would read again for each
WORDS = ["a" * 63 + chr(98 + i) for i in range(25)] + ["a" * length + "z" for length in range(1, 51)]


def taught() -> Callable[[str], Any]:
    found: list[TokenEmbedding] = []
    pattern = re.compile(_any_of([(word, TokenEmbedding(word, ())) for word in WORDS], found), re.I)
    return lambda text: sum(1 for _ in pattern.finditer(text[:MOST_PROMPT]))


PARSERS: dict[str, Callable[[str], Any]] = {
    "weighted prompt": lambda text: prompt.parse(text[:MOST_PROMPT]),
    "words of embeddings": taught(),
    "a word of an embedding": _TOKEN.fullmatch,
    "folder": TypeAdapter(universal.Folder).validate_python,
    "file name": TypeAdapter(universal.FileName).validate_python,
    "variant": TypeAdapter(Variant).validate_python,
    "data URI": lambda text: fetch.decode_data_uri(text, LENGTH),
    "data URI with signs": lambda text: fetch.decode_data_uri(f"data:,{text}", LENGTH),
    "own file": lambda text: fetch.own_key(text, "http://box"),
    "URL": guard.parse,
    "host": guard.literal,
    "host of a file": lambda text: guard.Guard(ReachSettings()).check_text(f"http://{text}/"),
    "proxied URL": addresses.parse_url,
    "host of a URL": lambda text: addresses.parse_url(f"http://{text}/"),
    "path": lambda text: addresses.canonical(f"/{text}", "", {}),
    "queue path": addresses.queue_path,
    "application": addresses.application,
    "Hub id": origins._HUB_ID.fullmatch,
    "size": openai._SIZE.fullmatch,
    "range": lambda text: downloads._span(text, LENGTH),
    "content type": uploads._CONTENT_TYPE.fullmatch,
    "file's name": lambda text: store.new_key(text, "image/png"),
    "JSON": lambda text: body.parse(text.encode()),
    "value of JSON": lambda text: body.check({"prompt": text}),
}


@pytest.mark.parametrize("name", PARSERS)
def test_t40_no_text_of_a_hundred_thousand_characters_takes_a_parser_long(name: str) -> None:
    for text in STRINGS:
        began = time.thread_time()
        with contextlib.suppress(DarkroomError, ValidationError):
            PARSERS[name](text)
        spent = time.thread_time() - began
        assert spent < 8, (text[:20], spent)  # 0.05 on a core of its own; by the square: 10 and more


def test_t40_the_longest_word_that_stands_there_is_read() -> None:
    words = ["cat", "Catfish", "ca", "<s0>", "<s1>", "dog", "İx"]
    found: list[TokenEmbedding] = []
    pattern = re.compile(_any_of([(word, TokenEmbedding(word, ())) for word in words], found), re.I)

    def read(text: str) -> list[str]:
        return [found[match.lastindex - 1].token for match in pattern.finditer(text) if match.lastindex]

    assert read("a catFISH, a CAT, a cab; <s0><S1> dogs") == ["Catfish", "cat", "ca", "<s0>", "<s1>", "dog"]
    assert read("İx do g") == ["İx"]


@pytest.mark.parametrize("endpoint_id", ENDPOINTS)
def test_t40_no_prompt_is_longer_than_what_tokenizers_are_given(endpoint_id: str) -> None:
    kind: Any = endpoint(endpoint_id).input_type()
    fields = [name for name in kind.model_fields if name.endswith("prompt") and name != "expand_prompt"]
    known = {"prompt": "x", "model_name": "x", "image_url": "x", "control_image_url": "x"}
    for field in fields:
        kind.model_validate(known | {field: "x" * MOST_PROMPT})
        with pytest.raises(ValidationError, match=f"at most {MOST_PROMPT} characters"):
            kind.model_validate(known | {field: "x" * (MOST_PROMPT + 1)})


@pytest.mark.parametrize(
    "piece", ["a", "ab", "a ", "é", "🎨", "1", "!", "'s", "antidisestablishmentarianism "]
)
def test_t40_the_longest_prompt_is_tokenized_in_a_moment(piece: str, tmp_path: Path) -> None:
    tokenizer = openai_vocabulary(tmp_path, 77)
    text = (piece * MOST_PROMPT)[:MOST_PROMPT]
    began = time.thread_time()
    tokenizer(text, add_special_tokens=False, truncation=True, max_length=1500)
    assert time.thread_time() - began < 1
