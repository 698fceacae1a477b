"""FLUX's attention, wider for the rows that ask for it.

A row of a forward attends to its own text and image tokens. Here it may attend to more:

- *conditions*: keys and values computed beforehand, which all of the row's queries see as well;
- a *reference*: another row of the same forward, whose image the row's image queries see in part,
  as reference-only control does (https://github.com/Mikubill/sd-webui-controlnet/discussions/1236).

It knows nothing of where conditions come from and what a reference shows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # keys and values, [tokens, heads, head_dim] each
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value [rows, tokens, heads, head_dim]


@dataclass(frozen=True, slots=True, eq=False)
class KeyValues:
    """A condition for every attention module: double blocks first, then single ones.

    The keys are normalised and rotated; both are on the transformer's device and in its dtype.
    """

    blocks: tuple[Pair, ...]

    @property
    def nbytes(self) -> int:
        return sum(key.nbytes + value.nbytes for key, value in self.blocks)


@dataclass(frozen=True, slots=True)
class Reference:
    """Which row of the forward holds the reference picture, and how much its image counts.

    0 is not at all, 1 as if it stood beside the row's own image; beyond 1 and below 0 extrapolates.
    """

    row: int
    strength: float


class WideAttention:
    """The attention of one transformer. Used by the thread that runs the transformer only."""

    def __init__(self, transformer: Any) -> None:
        """Puts a processor of its own into every attention module, for good."""
        self.active: _Views | None = None
        stock = transformer.attn_processors
        self._modules = len(stock)
        transformer.set_attn_processor(
            {name: _Processor(self, index, stock[name]) for index, name in enumerate(stock)}
        )

    @contextmanager
    def rows(
        self,
        text_length: int,
        conditions: Sequence[Sequence[KeyValues]],
        references: Sequence[Reference | None],
    ) -> Iterator[None]:
        """The forwards inside attend more widely, row by row; each has `text_length` text tokens a row.

        `conditions[row]` may be empty, and several are seen together, in whatever order. For the image
        queries of a row with a reference, let o be what the row sees otherwise, conditions included,
        and o_ref the same with the reference row's image keys and values added; they get
        o + strength · (o_ref - o). Its text queries and the reference row stay as they were.

        Where no row asks for anything, diffusers' own code runs.
        """
        assert len(conditions) == len(references), "conditions and references are of the same rows"
        assert all(len(each.blocks) == self._modules for banks in conditions for each in banks)
        assert all(each is None or 0 <= each.row < len(references) for each in references)
        used = [each if each and each.strength else None for each in references]
        if any(conditions) or any(used):
            self.active = _Views(text_length, conditions, used)
        try:
            yield
        finally:
            self.active = None


@dataclass(frozen=True, slots=True, eq=False)
class _Views:
    """What each row of the forwards under way looks at besides itself."""

    text_length: int
    conditions: Sequence[Sequence[KeyValues]]
    references: Sequence[Reference | None]

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Module `index`: [rows, text + image tokens, heads, head_dim] → the same for the outputs."""
        assert len(query) == len(self.conditions), f"{len(query)} rows, views of {len(self.conditions)}"
        seen = [
            [own, *(condition.blocks[index] for condition in conditions)]
            for own, conditions in zip(zip(key, value, strict=True), self.conditions, strict=True)
        ]
        outputs = _attend_by_length(query.unbind(), seen, attend)
        referring = {row: each for row, each in enumerate(self.references) if each}
        queries, keys, values = (each[:, self.text_length :] for each in (query, key, value))
        wider = [[*seen[row], (keys[each.row], values[each.row])] for row, each in referring.items()]
        shown = _attend_by_length([queries[row] for row in referring], wider, attend)
        for (row, reference), image in zip(referring.items(), shown, strict=True):
            text, usual = outputs[row].tensor_split([self.text_length])
            outputs[row] = torch.cat([text, torch.lerp(usual, image, reference.strength)])
        return torch.stack(outputs)


def _attend_by_length(
    queries: Sequence[Tensor], seen: Sequence[Sequence[Pair]], attend: Attend
) -> list[Tensor]:
    """Every row's output, [tokens, heads, head_dim] as its queries.

    Rows that see equally many tokens go through together. All by slices, without index tensors: a GPU
    would wait for those.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for row, parts in enumerate(seen):
        groups[sum(len(key) for key, _ in parts)].append(row)
    outputs: dict[int, Tensor] = {}
    for rows in groups.values():
        keys = torch.cat([key for row in rows for key, _ in seen[row]])
        values = torch.cat([value for row in rows for _, value in seen[row]])
        query = torch.stack([queries[row] for row in rows])
        per_row = (len(rows), -1, *query.shape[2:])
        attended = attend(query, keys.view(per_row), values.view(per_row))
        outputs |= zip(rows, attended.to(query.dtype), strict=True)
    return [outputs[row] for row in range(len(seen))]


class _Processor(FluxAttnProcessor):  # type: ignore[misc]  # diffusers is untyped here
    """The stock processor of one attention module, but while its owner is active."""

    def __init__(self, owner: WideAttention, index: int, stock: Any) -> None:
        super().__init__()
        self._owner = owner
        self._index = index
        self._attention_backend = stock._attention_backend
        self._parallel_config = stock._parallel_config

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Pair | None = None,
    ) -> Any:
        views = self._owner.active
        if views is None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        assert attention_mask is None, "a mask knows nothing of conditions"
        assert self._parallel_config is None, "every device would add the same conditions"
        query, key, value = _project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        attend = partial(dispatch_attention_fn, backend=self._attention_backend)
        attended = views.attend(self._index, query, key, value, attend).flatten(2)
        if encoder_hidden_states is None:
            return attended
        text, image = attended.tensor_split([views.text_length], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


def _project(
    attn: Any, image: Tensor, text: Tensor | None, rotary: Pair | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as FluxAttnProcessor has them.

    [rows, tokens, width] → [rows, text + image tokens, heads, head_dim]. In single blocks `image` is
    both joined, and text is None.
    """
    assert not attn.fused_projections, "LoRAs hook the separate projections"
    heads = (-1, attn.head_dim)
    query, key, value = (layer(image).unflatten(-1, heads) for layer in (attn.to_q, attn.to_k, attn.to_v))
    query, key = attn.norm_q(query), attn.norm_k(key)
    if text is not None:
        text_query, text_key, text_value = (
            layer(text).unflatten(-1, heads) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
        key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
        value = torch.cat([text_value, value], dim=1)
    if rotary is not None:
        query, key = (apply_rotary_emb(each, rotary, sequence_dim=1) for each in (query, key))
    return query, key, value
