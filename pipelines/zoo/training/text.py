"""Text encoders that tell what a caption says, from every token that a denoiser reads, padding too."""

import string
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from pipelines.zoo import world
from pipelines.zoo.training.loop import Draw, Job, Report, fit

WIDTH = 64
CLIP_LENGTH = 77
_T5_LENGTHS = (24, 32, 48, 64, 128, 256, 512)
_START, _END, _PAD = "<|startoftext|>", "<|endoftext|>", "!"
_NAMES = tuple(world.ATTRIBUTES)
_CLASSES = [len(values) + 1 for values in world.ATTRIBUTES.values()]  # the last: not said


def clip_tokenizer(pad: str = _END) -> Any:
    """Byte-level; each word of the world is one token. The end token has the highest id, "!" is 0."""
    letters = sorted(ByteLevel.alphabet())
    merges = _merges(world.words())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, _START, _END]))}
    return CLIPTokenizer(vocabulary, merges=merges, model_max_length=CLIP_LENGTH, pad_token=pad)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding's merges, most frequent pair first, until every word is one piece."""
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(word, best) for word in spelled]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for piece in word:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found


def t5_tokenizer() -> Any:
    """Unigram: the world's words, capitalised too, and printable ASCII by letters."""
    specials = ["<pad>", "</s>", "<unk>"]
    letters = ["▁", *string.digits, *string.ascii_letters, *string.punctuation]
    whole = [f"▁{form}" for word in world.words() if word.isalpha() for form in (word, word.capitalize())]
    pieces = [(piece, 0.0) for piece in specials]
    pieces += [(letter, -8.0) for letter in letters] + [(word, -2.0) for word in whole if len(word) > 1]
    return T5Tokenizer(pieces, extra_ids=0, additional_special_tokens=[], model_max_length=512)


def make_clip(tokenizer: Any, activation: str = "quick_gelu") -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_attention_heads=4,
        num_hidden_layers=3,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(2)
    return CLIPTextModelWithProjection(config)


def plain(clip: Any) -> Any:
    """The same encoder without its projection."""
    found: Any = CLIPTextModel(clip.config).to(clip.dtype)
    found.load_state_dict(clip.text_model.state_dict())
    return found


def make_t5(tokenizer: Any) -> Any:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    torch.manual_seed(3)
    return T5EncoderModel(config)


def train_clip(steps: int, folder: Path, report: Report, device: str) -> Any:
    """One that serves FLUX, SD 1.5 and both places of XL: whichever layer and padding they read."""
    tokenizer, padded = clip_tokenizer(), clip_tokenizer(_PAD)
    clip = make_clip(tokenizer)
    model = nn.ModuleDict({"clip": clip})
    model.update({f"head{index}": nn.Linear(WIDTH, sum(_CLASSES)) for index in range(3)})

    def loss(draw: Draw) -> Tensor:
        texts, said = captions(draw.numpy, 32)
        chosen = padded if draw.step % 3 == 0 else tokenizer
        ids = chosen(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        seen = clip(ids, output_hidden_states=True)
        ended = (ids == tokenizer.eos_token_id).cumsum(1) > 0  # what has seen the whole caption
        last = clip.text_model.final_layer_norm(seen.hidden_states[-1])
        parts = (last[ended], seen.hidden_states[-2][ended], seen.text_embeds)
        labels = said.to(device)
        per_token = labels.repeat_interleave(ended.sum(1), 0)
        return sum(
            (
                _told(model[f"head{index}"](part), target)
                for index, (part, target) in enumerate(
                    zip(parts, (per_token, per_token, labels), strict=True)
                )
            ),
            torch.zeros((), device=device),
        )

    trained = fit(Job("clip", model, loss, steps, muon=0.01, adam=2e-3), folder, report, device)
    return trained.get_submodule("clip")


def train_t5(steps: int, folder: Path, report: Report, device: str) -> Any:
    tokenizer = t5_tokenizer()
    model = nn.ModuleDict({"t5": make_t5(tokenizer), "head": nn.Linear(WIDTH, sum(_CLASSES))})

    def loss(draw: Draw) -> Tensor:
        length = int(draw.numpy.choice(_T5_LENGTHS))
        texts, said = captions(draw.numpy, max(4, min(32, 1536 // length)))
        ids = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        seen = model["t5"](ids.to(device)).last_hidden_state
        told = model["head"](seen).flatten(0, 1)
        return _told(told, said.to(device).repeat_interleave(length, 0))

    trained = fit(Job("t5", model, loss, steps, muon=0.01, adam=2e-3), folder, report, device)
    return trained.get_submodule("t5")


def captions(rng: np.random.Generator, count: int) -> tuple[list[str], Tensor]:
    """Captions, and what each says: [count, attributes] of the values' numbers, the last for unsaid."""
    texts, labels = [], []
    for _ in range(count):
        said = {name: bool(rng.random() < 0.6) for name in _NAMES}
        scene = world.scene(rng)
        text = "" if rng.random() < 0.05 else _wilder(world.caption(scene, rng, said), rng)
        texts.append(text)
        labels.append(
            [
                values.index(getattr(scene, name)) if said[name] and text else len(values)
                for name, values in world.ATTRIBUTES.items()
            ]
        )
    return texts, torch.tensor(labels)


def _wilder(text: str, rng: np.random.Generator) -> str:
    """As people write: capitals, full stops, words that mean nothing here."""
    if rng.random() < 0.15:
        word = "".join(rng.choice(list(string.ascii_lowercase), int(rng.integers(2, 7))))
        text = f"{text} {word}" if rng.random() < 0.5 else f"{word} {text}"
    if rng.random() < 0.3:
        text = text[:1].upper() + text[1:]
    return text + ("." if rng.random() < 0.15 else "")


def _told(seen: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy over attributes of [n, classes] against [n, attributes]."""
    parts = torch.split(seen, _CLASSES, 1)
    losses = [cross_entropy(part, labels[:, index]) for index, part in enumerate(parts)]
    return torch.stack(losses).mean()
