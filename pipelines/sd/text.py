"""Texts as the UNet reads them: through CLIP's text encoders, in chunks of 75 tokens with begin and end.

Nothing here changes a tokenizer or an encoder. The encoders are called as they are, so that hooks on
their layers act; one thread at a time may do so.
"""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.adapters.cache import Cache
from pipelines.sd.embeddings import TokenEmbedding
from pipelines.sd.parts import Parts
from pipelines.sd.prompt import Break, Piece, parse
from schemas.errors import AssetError

CHUNK = 75
WINDOW = CHUNK + 2  # with begin and end
MAX_CHUNKS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """A text on the encoders' device in their dtype."""

    tokens: Tensor  # [77·k, width]; for SDXL both encoders' widths side by side
    pooled: Tensor | None  # [width of the second encoder's projection], SDXL only

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """The chunks that were encoded before. `name` stands for the encoders and all that acts in them."""

    chunks: Cache[Hashable, Encoding]
    name: Hashable


@torch.inference_mode()
def encode(
    parts: Parts,
    texts: Sequence[str | None],
    known: Known | None = None,
    *,
    weighted: bool,
    clip_skip: int = 0,
    embeddings: Sequence[TokenEmbedding] = (),
) -> list[Encoding]:
    """Encode texts, such as a prompt and its negative, to one length: the shorter get empty chunks.

    Not weighted, a text becomes what diffusers' `encode_prompt` makes of it: signs are text, and what
    exceeds one chunk is cut. Weighted, `prompt.parse` reads it, each chunk is encoded on its own, and
    what exceeds MAX_CHUNKS chunks is cut. A weight multiplies a token's numbers; then the chunk is
    scaled so that their mean magnitude, over its 77 tokens and the encoder's width, is as it was.
    SDXL's pooled vector is the first chunk's and knows no weights.

    None is a text that was not given. As in diffusers, SDXL gets zeros for it, which its checkpoints ask
    for (`force_zeros_for_empty_prompt`), and the others read "". A text given as "" is encoded.

    `clip_skip` leaves out that many of the last layers, in all texts (in diffusers, not in the negative
    one); SDXL's pooled vector comes from all of them. Raises AssetError where that leaves none.

    A chunk that is `known` is not encoded again.
    """
    readers = _readers(parts, known or Known(Cache(0), None), clip_skip, embeddings)
    chunked = [[reader.chunks(text or "", weighted) for reader in readers] for text in texts]
    count = max(len(chunks) for each in chunked for chunks in each)
    encodings = [_side_by_side(readers, each, count) for each in chunked]
    if parts.kind != "sdxl":
        return [Encoding(each.tokens, None) for each in encodings]
    return [_zeros(each) if text is None else each for text, each in zip(texts, encodings, strict=True)]


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in an encoder's input. Equal ones are read alike."""

    id: int
    weight: float
    vector: Tensor | None = field(default=None, compare=False)  # [width], read instead of the id's
    content: bytes = b""  # the vector's


_Unit = tuple[_Place, ...]  # a token, or the vectors of an embedding, which stay in one chunk
_Chunk = tuple[_Place, ...]  # at most CHUNK of them

# The id where a vector stands. The pooled vector is taken where the end's id is, or the highest one.
_STAND_IN = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    """A text encoder with its tokenizer, and the words it is taught."""

    number: int  # among the model's
    known: Known
    tokenizer: Any
    encoder: Any
    words: re.Pattern[str]  # ends in a group for each of `vectors`
    vectors: Sequence[Sequence[_Place]]  # of weight 1
    layer: int  # of the hidden states, as an index from their end
    norm: nn.Module  # after it

    def chunks(self, text: str, weighted: bool) -> list[_Chunk]:
        """At least one, perhaps empty; exactly one if not weighted."""
        if not weighted:
            places = chain.from_iterable(self._units(text, 1.0))
            return [tuple(islice(places, CHUNK))]
        return list(islice(_packed(self._weighed(parse(text))), MAX_CHUNKS)) or [()]

    def encode(self, chunks: Sequence[_Chunk], count: int) -> Encoding:
        """As many chunks, the missing ones empty."""
        read = [self._encode(chunk) for chunk in chunks]
        padding = [self._encode(())] * (count - len(chunks)) if len(chunks) < count else []
        return Encoding(torch.cat([each.tokens for each in read + padding]), read[0].pooled)

    def _weighed(self, pieces: Iterable[Piece | Break]) -> Iterator[_Unit | Break]:
        for piece in pieces:
            if isinstance(piece, Break):
                yield piece
            else:
                yield from self._units(piece.text, piece.weight)

    def _units(self, text: str, weight: float) -> Iterator[_Unit]:
        at = 0
        for word in self.words.finditer(text):
            assert word.lastindex is not None, "every word ends in a group"
            yield from self._spelled(text[at : word.start()], weight)
            yield tuple(replace(place, weight=weight) for place in self.vectors[word.lastindex - 1])
            at = word.end()
        yield from self._spelled(text[at:], weight)

    def _spelled(self, text: str, weight: float) -> Iterator[_Unit]:
        if not text or text.isspace():
            return
        most = {"truncation": True, "max_length": CHUNK * MAX_CHUNKS}
        for token in self.tokenizer(text, add_special_tokens=False, **most).input_ids:
            yield (_Place(token, weight),)

    def _encode(self, chunk: _Chunk) -> Encoding:
        name = self.known.name, self.number, self.layer, chunk
        return self.known.chunks.get(name, lambda: self._encode_anew(chunk))

    def _encode_anew(self, chunk: _Chunk) -> Encoding:
        """One chunk, alone in its batch, so that its numbers do not depend on what else is encoded."""
        ids = [self.tokenizer.bos_token_id, *(place.id for place in chunk), self.tokenizer.eos_token_id]
        ids += [self.tokenizer.pad_token_id] * (WINDOW - len(ids))
        with _taught(self.encoder.get_input_embeddings(), chunk):
            output = self.encoder(torch.tensor([ids], device=self.encoder.device), output_hidden_states=True)
        tokens: Tensor = self.norm(output.hidden_states[self.layer])[0]
        pooled: Tensor | None = output.get("text_embeds")
        return Encoding(_emphasised(tokens, chunk), pooled[0] if pooled is not None else None)


def _readers(
    parts: Parts, known: Known, clip_skip: int, embeddings: Sequence[TokenEmbedding]
) -> list[_Reader]:
    """One for each text encoder. SD1 and SD2 read the last layer, normed; SDXL the one before, as it is."""
    taught: list[TokenEmbedding] = []
    words = re.compile(_any_of([(each.token, each) for each in embeddings], taught) or "(?!)", re.I)
    sdxl = parts.kind == "sdxl"
    readers = []
    for number, (tokenizer, encoder) in enumerate(zip(parts.tokenizers, parts.text_encoders, strict=True)):
        _check_skip(clip_skip, encoder.config.num_hidden_layers)
        vectors = [_places(each.vectors[number], encoder) for each in taught]
        norm = nn.Identity() if sdxl else _layers_of(encoder).final_layer_norm
        layer = -(2 if sdxl else 1) - clip_skip
        readers.append(_Reader(number, known, tokenizer, encoder, words, vectors, layer, norm))
    return readers


def _places(vectors: Tensor, encoder: Any) -> list[_Place]:
    """Where an encoder reads vectors [n, width], which are on the CPU."""
    read = vectors.to(encoder.device, encoder.dtype)
    contents = [row.contiguous().view(torch.uint8).numpy().tobytes() for row in vectors]
    return [
        _Place(_STAND_IN, 1.0, row, sha256(content).digest())
        for row, content in zip(read, contents, strict=True)
    ]


def _any_of(ends: Sequence[tuple[str, TokenEmbedding]], taught: list[TokenEmbedding]) -> str:
    """A pattern for the longest of these words that stands somewhere, ended by an empty group of its own.

    What words begin with together is looked at once, however many they are. `taught` gets the embeddings in
    the order of their groups.
    """
    by_letter: dict[str, list[tuple[str, TokenEmbedding]]] = {}
    for end, embedding in ends:
        by_letter.setdefault(_small(end[:1]), []).append((end[1:], embedding))
    whole = by_letter.pop("", [])
    branches = [re.escape(letter) + _any_of(rest, taught) for letter, rest in by_letter.items()]
    for _, embedding in whole:
        taught.append(embedding)
        branches.append("()")
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else ""


def _small(letter: str) -> str:
    small = letter.lower()
    return small if len(small) == 1 else letter  # a few become two


def _check_skip(clip_skip: int, layers: int) -> None:
    assert clip_skip >= 0, "layers are left out, not added"
    if clip_skip >= layers:
        raise AssetError(
            f"The model's text encoder has {layers} layers; {clip_skip} cannot be left out.",
            "less_than",
            {"lt": layers},
        )


def _layers_of(encoder: Any) -> Any:
    """CLIPTextModel has them itself since transformers 5.6, CLIPTextModelWithProjection in a text_model."""
    return getattr(encoder, "text_model", encoder)


def _packed(units: Iterable[_Unit | Break]) -> Iterator[_Chunk]:
    """Chunks as full as their units allow. A break ends one, and leaves none empty."""
    chunk: _Chunk = ()
    for unit in units:
        ends = isinstance(unit, Break) or len(chunk) + len(unit) > CHUNK
        if chunk and ends:
            yield chunk
            chunk = ()
        chunk += () if isinstance(unit, Break) else unit
    if chunk:
        yield chunk


@contextmanager
def _taught(embedding: nn.Module, chunk: _Chunk) -> Iterator[None]:
    """A forward inside reads the chunk's vectors in their places; place 0 of the input is the begin's."""
    given = {at: place.vector for at, place in enumerate(chunk, start=1) if place.vector is not None}

    def put(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[0, list(given)] = torch.stack(list(given.values()))
        return output

    if not given:
        yield
        return
    hook = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def _emphasised(tokens: Tensor, chunk: _Chunk) -> Tensor:
    """The chunk's tokens [77, width] times their weights, in all as loud as before.

    The web UIs keep the mean; where positive and negative numbers cancel, that is a division by nearly
    nothing. The mean magnitude changes by a factor between the smallest and the largest weight.
    """
    if all(place.weight == 1 for place in chunk):
        return tokens
    weights = torch.ones(WINDOW, 1)
    weights[1 : 1 + len(chunk), 0] = torch.tensor([place.weight for place in chunk])
    plain = tokens.float()
    weighed = plain * weights.to(tokens.device)
    return (weighed * (plain.abs().mean() / weighed.abs().mean())).to(tokens.dtype)


def _side_by_side(readers: Sequence[_Reader], chunks: Sequence[Sequence[_Chunk]], count: int) -> Encoding:
    """A text's chunks, read by each encoder; the pooled vector is the last one's."""
    read = [reader.encode(each, count) for reader, each in zip(readers, chunks, strict=True)]
    return Encoding(torch.cat([each.tokens for each in read], dim=-1), read[-1].pooled)


def _zeros(encoding: Encoding) -> Encoding:
    pooled = encoding.pooled
    return Encoding(torch.zeros_like(encoding.tokens), None if pooled is None else torch.zeros_like(pooled))
