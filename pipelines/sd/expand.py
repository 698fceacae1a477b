"""Prompts written on by a small language model of the operator's choice."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 77  # the tokens that CLIP reads at once, begin and end among them
_MOST_NEW = 75
_TOP_K = 50


class Expander:
    """A causal language model with its tokenizer; CLIP's tokenizer says how much fits."""

    def __init__(self, model: Any, tokenizer: Any, clip_tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._clip_tokenizer = clip_tokenizer
        self._positions: int | None = getattr(model.config, "max_position_embeddings", None)

    @classmethod
    def load(cls, source: Path | str, device: str, clip_tokenizer: Any) -> Self:
        """A folder or Hub id from the settings: safetensors only, and no code that comes with them."""
        model = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return cls(model.requires_grad_(False).to(device), tokenizer, clip_tokenizer)

    @torch.inference_mode()
    def expand(self, prompt: str, seed: int) -> str:
        """The prompt as it is, and behind it what the model makes of it with this seed.

        The addition has no line breaks nor other control characters. It ends where the model ends it or
        begins a line, and at the latest, between words, where CLIP's window or _MOST_NEW does. A prompt
        that leaves no room comes back alone.
        """
        added = ""
        for longer, ended in self._additions(prompt, seed):
            if not self._fits(prompt + longer):
                break
            added = longer
            if ended:
                return prompt + added
        return prompt + _whole_words(added)

    def _fits(self, text: str) -> bool:
        ids = self._clip_tokenizer(text, truncation=True, max_length=WINDOW + 1).input_ids
        return len(ids) <= WINDOW

    def _additions(self, prompt: str, seed: int) -> Iterator[tuple[str, bool]]:
        """What is written behind the prompt, longer by a token each time, and whether the model ended it."""
        ids = self._read(prompt)
        before = len(self._decode(ids))
        for token in self._sampled(ids, seed):
            ids.append(token)
            line, *more = _LINE_END.split(self._decode(ids)[before:], maxsplit=1)
            whole = line.replace("\ufffd", "")  # half a character; the next token has the other half
            yield whole, bool(more) or token == self._tokenizer.eos_token_id

    def _read(self, prompt: str) -> list[int]:
        """The prompt, or as much of its end as leaves half the model's positions; not empty."""
        ids: list[int] = self._tokenizer(prompt).input_ids
        if not ids:
            start = self._tokenizer.bos_token_id
            ids = [self._tokenizer.eos_token_id if start is None else start]
        return ids if self._positions is None else ids[-(self._positions // 2) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _sampled(self, ids: Sequence[int], seed: int) -> Iterator[int]:
        """New tokens, drawn from a generator of their own."""
        generator = torch.Generator("cpu").manual_seed(seed)
        room = _MOST_NEW if self._positions is None else min(_MOST_NEW, self._positions - len(ids))
        new, cache = [*ids], None
        for _ in range(room):
            inputs = torch.tensor([new], device=self._model.device)
            output = self._model(inputs, past_key_values=cache, use_cache=True)
            token = _draw(output.logits[0, -1], generator)
            yield token
            new, cache = [token], output.past_key_values


def _draw(logits: Tensor, generator: torch.Generator) -> int:
    """One of the likeliest tokens, from logits [vocabulary]."""
    likeliest = logits.float().cpu().topk(min(_TOP_K, len(logits)))
    chosen = torch.multinomial(likeliest.values.softmax(0), 1, generator=generator)
    return int(likeliest.indices[chosen])


_LINE_END = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _whole_words(text: str) -> str:
    """Without the last word, which may be half of one; writing without spaces stays whole."""
    words, space, _ = text.rpartition(" ")
    return words if space else text
