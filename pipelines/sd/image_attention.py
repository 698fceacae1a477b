"""Cross-attention that looks at pictures beside the text, for the rows that ask for it.

An IP-Adapter (arXiv 2308.06721) has, in each cross-attention module, keys and values for the tokens of a
picture. What a row's queries find there is added, scaled, to what they find in the text. InstantID (arXiv
2401.07519) does the same with a face. Rows of one forward may have different adapters, any number each.

It knows nothing of where the keys and values come from.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention

from pipelines.sd.tiles import Tile

Pair = tuple[Tensor, Tensor]  # keys and values, [tokens, heads · head_dim] each


@dataclass(frozen=True, slots=True, eq=False)
class ImagePrompt:
    """What a row's queries see beside the text, from one adapter.

    `pairs` and `scales` are by cross-attention module, as ImageAttention names them; a scale of 0 is off.
    The pairs are on the UNet's device, in its dtype. `mask`, if there is one, is where the adapter acts:
    [1, rows, columns] of the latents in [0, 1], on the same device.
    """

    pairs: tuple[Pair, ...]
    scales: tuple[float, ...]
    mask: Tensor | None = None

    def cropped(self, tile: Tile) -> "ImagePrompt":
        """The same for a part of the latents: the mask's part."""
        return self if self.mask is None else replace(self, mask=tile.crop(self.mask))

    @property
    def nbytes(self) -> int:
        return sum(key.nbytes + value.nbytes for key, value in self.pairs) + (
            0 if self.mask is None else self.mask.nbytes
        )


def cross_attention(unet: Any) -> tuple[str, ...]:
    """The cross-attention modules of a UNet, in diffusers' order, by which IP-Adapters number them."""
    names = (name.removesuffix(".processor") for name in unet.attn_processors)
    return tuple(name for name in names if name.endswith(".attn2"))


class ImageAttention:
    """The cross-attention of one UNet. Used by the thread that runs the UNet only."""

    def __init__(self, unet: Any) -> None:
        """Puts a processor of its own into every cross-attention module, for good."""
        self.active: _Views | None = None
        self.modules = cross_attention(unet)
        processors = unet.attn_processors
        for index, module in enumerate(self.modules):
            name = f"{module}.processor"
            processors[name] = _Processor(self, index, processors[name])
        unet.set_attn_processor(processors)

    @contextmanager
    def rows(self, prompts: Sequence[Sequence[ImagePrompt]], size: tuple[int, int]) -> Iterator[None]:
        """The forwards inside look at `prompts[row]` in each row, for latents of `size`: rows, columns.

        A row may have none. Where no row asks for anything, diffusers' own code runs.
        """
        for prompt in (each for row in prompts for each in row):
            assert len(prompt.pairs) == len(prompt.scales) == len(self.modules), "made for another UNet"
            assert prompt.mask is None or prompt.mask.shape == (1, *size), "the mask is of another size"
        if any(any(each.scales) for row in prompts for each in row):
            self.active = _Views(prompts, size)
        try:
            yield
        finally:
            self.active = None


Use = tuple[int, ImagePrompt]  # a row, and what it looks at


@dataclass(frozen=True, slots=True, eq=False)
class _Views:
    """What each row of the forwards under way looks at besides its text."""

    prompts: Sequence[Sequence[ImagePrompt]]
    size: tuple[int, int]
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by the mask's id and its cells

    def uses(self, index: int) -> list[Use]:
        """What acts in module `index`."""
        return [
            (row, each) for row, prompts in enumerate(self.prompts) for each in prompts if each.scales[index]
        ]

    def add(self, index: int, query: Tensor, found: Tensor) -> None:
        """Add to what module `index` found in the text, [rows, queries, heads · head_dim], in place.

        `query` is [rows, heads, queries, head_dim]. Uses of equally many tokens go through together, and
        each is weighed by its own numbers, so that a row's result is the same whatever its neighbours use.
        """
        assert len(query) == len(self.prompts), f"{len(query)} rows, prompts for {len(self.prompts)}"
        groups: dict[int, list[Use]] = defaultdict(list)
        for row, prompt in self.uses(index):
            groups[len(prompt.pairs[index][0])].append((row, prompt))
        for uses in groups.values():
            key, value = (
                _by_head(torch.stack([prompt.pairs[index][part] for _, prompt in uses]), query.shape[1])
                for part in (0, 1)
            )
            seen = _flat(scaled_dot_product_attention(_rows(query, uses), key, value)).to(found.dtype)
            for (row, prompt), share in zip(uses, seen, strict=True):
                if prompt.mask is not None:
                    share = share * self._mask(prompt.mask, found)
                found[row].add_(share, alpha=prompt.scales[index])

    def _mask(self, mask: Tensor, found: Tensor) -> Tensor:
        """[1, rows, columns] of the latents → [queries, 1], as `found` is.

        Resized as IPAdapterMaskProcessor.downsample in diffusers does. That guesses the module's grid by
        the count of its queries, which fails for odd sizes; we follow the UNet down.
        """
        queries = found.shape[1]
        key = id(mask), queries
        if key not in self.masks:
            resized = interpolate(mask[None].float(), size=_grid(self.size, queries), mode="bicubic")
            self.masks[key] = resized.flatten()[:, None].to(found)
        return self.masks[key]


def _grid(size: tuple[int, int], queries: int) -> tuple[int, int]:
    """The rows and columns that a module with so many queries sees; every step down halves, rounding up."""
    rows, columns = size
    while rows * columns > queries:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    assert rows * columns == queries, f"{queries} queries are no level of latents of {size}"
    return rows, columns


def _rows(query: Tensor, uses: Sequence[Use]) -> Tensor:
    """The queries of each use. By slices, without index tensors: a GPU would wait for those."""
    rows = [row for row, _ in uses]
    return query if rows == list(range(len(query))) else torch.stack([query[row] for row in rows])


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """[rows, tokens, heads · head_dim] → [rows, heads, tokens, head_dim]."""
    return tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2)


def _flat(tokens: Tensor) -> Tensor:
    """[rows, heads, tokens, head_dim] → [rows, tokens, heads · head_dim]."""
    return tokens.transpose(1, 2).flatten(2)


class _Processor:
    """The stock processor of one cross-attention module, but where its owner's rows look at pictures."""

    def __init__(self, owner: ImageAttention, index: int, stock: Any) -> None:
        assert isinstance(stock, AttnProcessor2_0), (
            f"{type(stock).__name__} is not diffusers' usual processor"
        )
        self._owner = owner
        self._index = index
        self._stock = stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        views = self._owner.active
        if views is None or not views.uses(self._index):
            answer: Tensor = self._stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return answer
        assert attn.spatial_norm is None and hidden_states.ndim == 3, "this is a transformer's attention"
        query, key, value = _project(attn, hidden_states, encoder_hidden_states)
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, key.shape[2], len(key))
            attention_mask = mask.view(len(key), attn.heads, -1, mask.shape[-1])
        seen = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        found = _flat(seen).to(query.dtype)
        views.add(self._index, query, found)
        found = attn.to_out[1](attn.to_out[0](found))
        if attn.residual_connection:
            found = found + hidden_states
        rescaled: Tensor = found / attn.rescale_output_factor
        return rescaled


def _project(attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as AttnProcessor2_0 has them.

    [rows, tokens, width] → [rows, heads, tokens, head_dim].
    """
    if attn.group_norm is not None:
        image = attn.group_norm(image.transpose(1, 2)).transpose(1, 2)
    if text is None:
        text = image
    elif attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    query, key, value = (
        _by_head(layer(tokens), attn.heads)
        for layer, tokens in ((attn.to_q, image), (attn.to_k, text), (attn.to_v, text))
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value
