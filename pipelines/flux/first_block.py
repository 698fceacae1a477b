"""FLUX's forward in three parts, so that a row may reuse the middle one from an earlier step.

FLUX's blocks change their input little by little, and from one step to the next by almost the same. So where
the first block changes a row's input as it did at the row's last whole step, the sum of what the others
added then is added again: a first-block cache (ParaAttention; FirstBlockCache in diffusers). It is lossy.

The parts together are FluxTransformer2DModel.forward of diffusers 0.42.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

# how much the first block's change may differ from that of the last whole step, relatively, by acceleration
THRESHOLDS: Mapping[str, float] = MappingProxyType({"regular": 0.08, "high": 0.15})

Residuals = list[Tensor] | None  # one for each block, [rows, tokens, width]


@dataclass(frozen=True, slots=True, eq=False)
class Remembered:
    """What a row keeps of its last whole step: what the first block and all others added to its image."""

    step: int
    first: Tensor  # [tokens, width]
    others: Tensor

    def difference(self, first: Tensor) -> Tensor:
        """Of the first block's change now from then: a mean of magnitudes over a mean of magnitudes, [].

        By the row alone, so that its neighbours do not matter.
        """
        return (first - self.first).abs().float().mean() / self.first.abs().float().mean()


@dataclass(frozen=True, slots=True, eq=False)
class Under:
    """Rows on their way through the blocks."""

    image: Tensor  # [rows, tokens, width]
    text: Tensor  # [rows, text tokens, width]
    time: Tensor  # [rows, width]
    rotary: tuple[Tensor, Tensor]

    def of(self, rows: Sequence[int]) -> "Under":
        """Some of the rows."""
        if list(rows) == list(range(len(self.image))):
            return self
        image, text, time = (
            torch.stack([each[row] for row in rows]) for each in (self.image, self.text, self.time)
        )
        return Under(image, text, time, self.rotary)


def begin(transformer: Any, inputs: dict[str, Any], blocks: Residuals) -> tuple[Under, Tensor]:
    """The rows after the first block, and what that added to their images."""
    image = transformer.x_embedder(inputs["hidden_states"])
    timestep = inputs["timestep"].to(image.dtype) * 1000
    numbers = [timestep]
    if inputs["guidance"] is not None:
        numbers.append(inputs["guidance"].to(image.dtype) * 1000)
    time = transformer.time_text_embed(*numbers, inputs["pooled_projections"])
    text = transformer.context_embedder(inputs["encoder_hidden_states"])
    rotary = transformer.pos_embed(torch.cat((inputs["txt_ids"], inputs["img_ids"]), dim=0))
    under = _through(
        transformer.transformer_blocks[0], Under(image, text, time, rotary), _at(blocks, 0, None)
    )
    return under, under.image - image


def others(
    transformer: Any, under: Under, rows: Sequence[int], blocks: Residuals, single_blocks: Residuals
) -> Tensor:
    """The images of these rows after all blocks, [rows, tokens, width]."""
    under = under.of(rows)
    for index, block in enumerate(transformer.transformer_blocks[1:], 1):
        under = _through(block, under, _at(blocks, index, rows))
    for index, block in enumerate(transformer.single_transformer_blocks):
        under = _through(block, under, _at(single_blocks, index, rows))
    return under.image


def end(transformer: Any, image: Tensor, time: Tensor) -> Tensor:
    """The prediction, [rows, tokens, 64]."""
    output: Tensor = transformer.proj_out(transformer.norm_out(image, time))
    return output


def _through(block: Any, under: Under, residual: Tensor | None) -> Under:
    text, image = block(
        hidden_states=under.image,
        encoder_hidden_states=under.text,
        temb=under.time,
        image_rotary_emb=under.rotary,
        joint_attention_kwargs=None,
    )
    return Under(image if residual is None else image + residual, text, under.time, under.rotary)


def _at(residuals: Residuals, block: int, rows: Sequence[int] | None) -> Tensor | None:
    if residuals is None:
        return None
    return residuals[block] if rows is None else torch.stack([residuals[block][row] for row in rows])
