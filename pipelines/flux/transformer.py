"""FLUX's transformer with everything that may steer a row of its forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipelines.adapters.bank import LoraBank
from pipelines.adapters.norms import Norms
from pipelines.flux import easycontrol
from pipelines.flux.attention import KeyValues, Reference, WideAttention
from pipelines.flux.controlnet import residuals
from pipelines.flux.embedder import Embedder
from pipelines.flux.lora_keys import norms
from pipelines.flux.plan import Attended, Row
from pipelines.flux.sampling import Grid, image_ids


class AdaptedTransformer:
    """A FluxTransformer2DModel whose rows each have their own adapters and guides.

    Its parameters stay as they were loaded. `bank` holds LoRAs beside its layers. Used by one thread.
    """

    def __init__(self, transformer: Any, bank: LoraBank) -> None:
        self._transformer = transformer
        self._device: torch.device = transformer.device  # diffusers looks for them in every module
        self._dtype: torch.dtype = transformer.dtype
        self._blocks = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
        self._bank = bank
        self._norms = Norms(
            {
                name: transformer.get_submodule(name.removeprefix("transformer."))
                for name in norms(transformer)
            }
        )
        self._embedder = Embedder(transformer.x_embedder)
        self._attention = WideAttention(transformer)

    def predict(self, rows: Sequence[Row], latents: Sequence[Tensor], grid: Grid) -> Sequence[Tensor]:
        """The velocity of each row's latents [tokens, 64], float32, by one forward.

        All rows have the same text length. A picture to be like goes along as one more row.
        """
        asked = len(rows)
        rows, latents, references = _with_references(rows, latents)
        inputs = self._inputs(rows, latents, grid)
        blocks, single_blocks = residuals([row.controls for row in rows], inputs, *self._blocks)
        conditions = [[self._key_values(row, each) for each in row.conditions] for row in rows]
        with (
            self._adapted(rows),
            self._embedder.rows([row.embedding for row in rows]),
            self._attention.rows(len(rows[0].conditioning.tokens), conditions, references),
        ):
            velocity: Tensor = self._transformer(
                **inputs,
                controlnet_block_samples=blocks,
                controlnet_single_block_samples=single_blocks,
                return_dict=False,
            )[0]
        return velocity[:asked].float().unbind()

    def _inputs(self, rows: Sequence[Row], latents: Sequence[Tensor], grid: Grid) -> dict[str, Any]:
        """What the transformer and the ControlNets are called with."""
        device, dtype = self._device, self._dtype
        sigmas = torch.tensor([row.sigma for row in rows], device=device)
        takes_guidance: bool = self._transformer.config.guidance_embeds
        return {
            "hidden_states": torch.stack(list(latents)).to(dtype),
            # diffusers rounds the timestep in thousandths to the model's dtype; so do we
            "timestep": (sigmas * 1000).to(dtype) / 1000,
            "guidance": torch.tensor([row.guidance for row in rows], device=device)
            if takes_guidance
            else None,
            "pooled_projections": torch.stack([row.conditioning.pooled for row in rows]),
            "encoder_hidden_states": torch.stack([row.conditioning.tokens for row in rows]),
            "txt_ids": torch.zeros(len(rows[0].conditioning.tokens), 3, device=device, dtype=dtype),
            "img_ids": image_ids(grid).to(device, dtype),
        }

    @contextmanager
    def _adapted(self, rows: Sequence[Row]) -> Iterator[None]:
        """The layers inside act with each row's adapters."""
        with (
            self._bank.rows([row.adapters.loras for row in rows]),
            self._norms.rows([row.adapters.norms for row in rows]),
        ):
            yield

    def _key_values(self, row: Row, attended: Attended) -> KeyValues:
        """Computed here when first needed: on this thread, where no forward's adapters are in the way."""
        if attended.key_values is None:
            with self._adapted([row]):
                attended.key_values = easycontrol.keys_values(
                    self._transformer, attended.condition, row.guidance, row.conditioning.pooled
                )
        return attended.key_values


def _with_references(
    rows: Sequence[Row], latents: Sequence[Tensor]
) -> tuple[Sequence[Row], Sequence[Tensor], Sequence[Reference | None]]:
    """The rows, then one for each picture to be like; and which row looks at which."""
    likes = [index for index, row in enumerate(rows) if row.reference]
    extra, seen = [], []
    references: list[Reference | None] = [None] * (len(rows) + len(likes))
    for place, index in enumerate(likes, len(rows)):
        row = rows[index]
        assert row.reference is not None
        references[index] = Reference(place, row.reference.strength)
        extra.append(replace(row, controls=(), conditions=(), reference=None))
        seen.append(row.reference.at(row.sigma))
    return [*rows, *extra], [*latents, *seen], references
