"""CLIP's tokenizers, from the files beside a model, or with OpenAI's own vocabulary.

Built from words and merges alone: the algorithm is always CLIP's, and a file can bring no other.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from pipelines.adapters.tensor_file import invalid

_OPENAI = Path(__file__).parent / "configs" / "clip" / "merges.txt.gz"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_MOST_BYTES = 16 << 20  # CLIP's tokenizer.json has 3.6 MB

Merge = tuple[str, str]


def read(folder: Path, length: int) -> Any:
    """The tokenizer of a model's folder, for texts of `length` tokens.

    The words are in vocab.json and merges.txt, or in tokenizer.json. Raises AssetError.
    """
    if (folder / "vocab.json").is_file():
        words: object = _json(folder / "vocab.json")
        merges: object = [line for line in _body(_text(folder / "merges.txt")) if line]
    elif (folder / "tokenizer.json").is_file():
        model = _json(folder / "tokenizer.json").get("model")
        if not isinstance(model, dict):
            raise _unusable(folder, "its tokenizer.json has no model")
        words, merges = model.get("vocab"), model.get("merges")
    else:
        raise invalid(f"The model has no vocabulary: neither {folder.name}/vocab.json nor tokenizer.json.")
    known = _checked_words(folder, words)
    return _tokenizer(folder, known, _checked_merges(folder, merges, known), length)


def openai(folder: Path, length: int) -> Any:
    """As `read`, of a folder that has no words of its own: CLIP's published ones."""
    lines = gzip.decompress(_OPENAI.read_bytes()).decode()
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in _body(lines))]
    letters = sorted(ByteLevel.alphabet())  # OpenAI's order of bytes, "!" first
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), _START, _END]
    return _tokenizer(folder, {piece: index for index, piece in enumerate(pieces)}, merges, length)


def _tokenizer(folder: Path, words: dict[str, int], merges: list[Merge], length: int) -> Any:
    pad = _pad(folder)
    for special in (_START, _END, pad):
        if special not in words:
            raise _unusable(folder, f"its vocabulary has no {special}")
    tokenizer = CLIPTokenizer(
        words, merges=merges, bos_token=_START, eos_token=_END, pad_token=pad, model_max_length=length
    )
    tokenizer.add_tokens(_added(folder, words))
    return tokenizer


def _added(folder: Path, words: Mapping[str, int]) -> list[str]:
    """Words beyond the vocabulary, such as trained ones, by rising id."""
    found: dict[str, object] = {}
    if (folder / "added_tokens.json").is_file():
        found |= _json(folder / "added_tokens.json")
    if (folder / "tokenizer.json").is_file():
        found |= _contents(_json(folder / "tokenizer.json").get("added_tokens"))
    if (folder / "tokenizer_config.json").is_file():
        decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
        if isinstance(decoder, dict):
            found |= _contents([{**entry, "id": _number(key)} for key, entry in _objects(decoder)])
    ids = {index: word for word, index in found.items() if word not in words and isinstance(index, int)}
    if sorted(ids) != list(range(len(words), len(words) + len(ids))):
        raise _unusable(folder, "the ids of its added tokens do not follow those of its words")
    return [ids[index] for index in sorted(ids)]


def _contents(entries: object) -> dict[str, object]:
    """Added tokens as transformers notes them: [{"id": 49408, "content": "<cat>"}, …]."""
    if not isinstance(entries, list):
        return {}
    known = (entry for entry in entries if isinstance(entry, dict))
    return {entry["content"]: entry.get("id") for entry in known if isinstance(entry.get("content"), str)}


def _objects(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((key, value) for key, value in values.items() if isinstance(value, dict))


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _pad(folder: Path) -> str:
    """The padding token; special_tokens_map.json goes first, as for SD 2.1, whose files disagree."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = _json(folder / name).get("pad_token")
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                return content
    return _END


def _checked_words(folder: Path, words: object) -> dict[str, int]:
    """Ids are 0, 1, 2 …, each once."""
    if not isinstance(words, dict) or any(type(index) is not int for index in words.values()):
        raise _unusable(folder, "its vocabulary is not a map from words to numbers")
    if sorted(words.values()) != list(range(len(words))):
        raise _unusable(folder, "its ids are not 0, 1, 2 …, each once")
    return words


def _checked_merges(folder: Path, merges: object, words: Mapping[str, int]) -> list[Merge]:
    """Pairs of words that together are a word."""
    if not isinstance(merges, list):
        raise _unusable(folder, "it has no list of merges")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        match pair:
            case (str(first), str(second)) if first in words and second in words and first + second in words:
                pass
            case _:
                raise _unusable(folder, f"its merge {str(pair)[:100]} is not of two words to a third")
    return [(first, second) for first, second in pairs]


def _body(text: str) -> list[str]:
    lines = text.rstrip("\n").split("\n")
    return lines[1:] if lines[0].startswith("#version") else lines


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise _unusable(path.parent, f"{path.name} is not JSON") from error
    if not isinstance(value, dict):
        raise _unusable(path.parent, f"{path.name} is not an object")
    return value


def _text(path: Path) -> str:
    if not path.is_file():
        raise _unusable(path.parent, f"it has no {path.name}")
    if path.stat().st_size > _MOST_BYTES:
        raise _unusable(path.parent, f"{path.name} is larger than {_MOST_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _unusable(path.parent, f"{path.name} is not UTF-8") from error


def _unusable(folder: Path, fault: str) -> Exception:
    return invalid(f"The model's {folder.name} is not usable: {fault}.")
