"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): files of vectors for words of one's own."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipelines.adapters import tensor_file
from pipelines.adapters.tensor_file import TensorFile, check_finite, invalid, listed
from pipelines.sd.parts import Parts

MAX_VECTORS = 75  # as many as an encoder reads at once, without begin and end


@dataclass(frozen=True, slots=True, eq=False)
class TokenEmbedding:
    """A word in prompts, capitalised or not, and the vectors that an encoder reads in its place."""

    token: str
    vectors: tuple[Tensor, ...]  # [n, width] for each text encoder, on the CPU in the encoder's dtype


def read(path: Path, tokens: Sequence[str], parts: Parts) -> tuple[TokenEmbedding, ...]:
    """The embeddings in a safetensors file: a vector for each token, or all of them for a single one.

    Each text encoder needs its tensor, and none may be left over. SDXL's files have two: without the
    second part, a word would be spelled out to the second encoder letter by letter. Raises AssetError
    ("invalid_weights") that says what does not fit.
    """
    _check_tokens(tokens, parts)
    file = tensor_file.read(path)
    keys = _keys(file, len(parts.text_encoders))
    _check_shapes(file, keys, tokens, parts)
    loaded = file.load()
    tensors = {
        key: loaded[key].reshape(-1, loaded[key].shape[-1]).to(encoder.dtype)
        for key, encoder in zip(keys, parts.text_encoders, strict=True)
    }
    check_finite(tensors)
    shares = [tensor.chunk(len(tokens)) for tensor in tensors.values()]
    return tuple(map(TokenEmbedding, tokens, zip(*shares, strict=True)))


# A bracket, a backslash or a doubled sign would be taken for a weight before the word is looked for.
_TOKEN = re.compile(r"(?!.*(?:\+\+|--|[+-]$))[^\s()\[\]\\]{1,64}")


def _check_tokens(tokens: Sequence[str], parts: Parts) -> None:
    if not 1 <= len(tokens) <= MAX_VECTORS:
        raise invalid(f"An embedding stands for 1 to {MAX_VECTORS} tokens, not {len(tokens)}.")
    vocabularies = [tokenizer.get_vocab() for tokenizer in parts.tokenizers]
    for token in tokens:
        if not _TOKEN.fullmatch(token):
            raise invalid(
                f"{token[:64]!r} cannot be a token: it takes 1 to 64 characters without spaces, brackets "
                "or backslashes, and without + or - twice in a row or at the end."
            )
        if any(token.lower() in vocabulary for vocabulary in vocabularies):
            raise invalid(f"{token!r} is among the text encoder's own words; name the token otherwise.")
    if len({token.lower() for token in tokens}) < len(tokens):
        raise invalid(f"The tokens {', '.join(tokens)} are not all different.")


# As diffusers' and kohya's trainers name them, by encoder; "emb_params" and "*" are the web UIs' words.
_NAMES = (
    ("clip_l", "text_encoders_0", "text_encoder", "emb_params", "*"),
    ("clip_g", "text_encoders_1", "text_encoder_2"),
)


def _keys(file: TensorFile, encoders: int) -> tuple[str, ...]:
    """The file's key for each encoder. A tensor on its own may have any name: diffusers' is the word."""
    found = [[name for name in names if name in file.shapes] for names in _NAMES]
    if len(file.shapes) == 1 and not any(found):
        found[0] = list(file.shapes)
    unknown = file.shapes.keys() - {key for keys in found for key in keys}
    if unknown or any(len(keys) > 1 for keys in found):
        raise invalid(f"The file is not a textual inversion embedding: it holds {listed(file.shapes)}.")
    if any(found[encoders:]):
        raise invalid(f"The embedding was made for SDXL: {found[1][0]} is for a second text encoder.")
    missing = [names[0] for names, keys in zip(_NAMES[:encoders], found, strict=False) if not keys]
    if missing:
        raise invalid(
            f"The embedding was not made for SDXL, which has two text encoders: it has {listed(file.shapes)} "
            f"and lacks {listed(missing)}."
        )
    return tuple(key for keys in found for key in keys)


def _check_shapes(file: TensorFile, keys: Sequence[str], tokens: Sequence[str], parts: Parts) -> None:
    for key, encoder in zip(keys, parts.text_encoders, strict=True):
        shape, width = file.shapes[key], encoder.get_input_embeddings().embedding_dim
        if len(shape) not in (1, 2):
            raise invalid(f"{key} has the shape {list(shape)}; rows of vectors are expected.")
        if shape[-1] != width:
            raise invalid(
                f"The embedding was made for another text encoder: the vectors of {key} have {shape[-1]} "
                f"numbers, this model's have {width}."
            )
    rows = [math.prod(file.shapes[key][:-1]) for key in keys]
    if len(set(rows)) > 1:
        raise invalid(f"{listed(keys)} should hold equally many vectors, not {listed(list(map(str, rows)))}.")
    if rows[0] > MAX_VECTORS:
        raise invalid(f"The embedding holds {rows[0]} vectors; at most {MAX_VECTORS} fit into a text.")
    if len(tokens) not in (1, rows[0]):
        raise invalid(
            f"The embedding's vectors are {rows[0]}, but the tokens are {len(tokens)}: name as many, or one "
            "token that stands for all vectors."
        )
