"""FLUX's transformer with everything that may steer a row of its forward."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipelines.adapters.bank import LoraBank
from pipelines.adapters.norms import Norms
from pipelines.flux import easycontrol
from pipelines.flux.attention import KeyValues, Reference, WideAttention
from pipelines.flux.controlnet import Residuals, residuals
from pipelines.flux.embedder import Embedder
from pipelines.flux.first_block import Remembered, begin, end, others
from pipelines.flux.lora_keys import norms
from pipelines.flux.plan import Adapters, Attended, Conditioning, Row
from pipelines.flux.sampling import Grid, image_ids
from pipelines.speed.denoiser import Denoiser
from schemas.settings import SpeedSettings

BLOCKS = ("FluxTransformerBlock", "FluxSingleTransformerBlock")  # which are compiled, and quantised


class AdaptedTransformer:
    """A FluxTransformer2DModel whose rows each have their own adapters and guides.

    Its parameters stay as they were loaded. `bank` holds LoRAs beside its layers. It computes in `dtype`.
    Used by one thread.
    """

    def __init__(self, transformer: Any, bank: LoraBank, dtype: torch.dtype, speed: SpeedSettings) -> None:
        self._transformer = transformer
        self._device: torch.device = transformer.device  # diffusers looks for it in every module
        self._dtype = dtype
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
        self.denoiser = Denoiser(transformer, bank, BLOCKS, speed)

    def predict(
        self,
        rows: Sequence[Row],
        latents: Sequence[Tensor],
        grid: Grid,
        memories: Sequence[Remembered | None] | None = None,
        step: Sequence[int] = (),
    ) -> tuple[Sequence[Tensor], Sequence[Remembered | None]]:
        """The velocity of each row's latents [tokens, 64], float32, by one forward; and what to remember.

        All rows have the same text length. A picture to be like goes along as one more row. A row that may
        reuse does so where what it remembers of an earlier step allows it; `step` has the rows' own.
        """
        known = list(memories or [None] * len(rows))
        asked = len(rows)
        rows, latents, references = _with_references(rows, latents)
        batch = self._batch(rows, references, self._inputs(rows, latents, grid), grid)
        if any(row.reuse is not None for row in rows):
            velocity, known = self._reusing(batch, known, step or [0] * asked)
        else:
            with self._steered(batch, range(len(rows))):
                velocity = self.denoiser(
                    {
                        **batch.inputs,
                        "controlnet_block_samples": batch.blocks,
                        "controlnet_single_block_samples": batch.single_blocks,
                    },
                    batch.key,
                )
        return velocity[:asked].float().unbind(), known

    def _batch(
        self, rows: Sequence[Row], references: Sequence[Reference | None], inputs: dict[str, Any], grid: Grid
    ) -> "_Batch":
        blocks, single_blocks = residuals([row.controls for row in rows], inputs, *self._blocks)
        conditions = [[self._key_values(row, each) for each in row.conditions] for row in rows]
        return _Batch(rows, references, conditions, inputs, blocks, single_blocks, grid)

    @contextmanager
    def _steered(self, batch: "_Batch", indices: Sequence[int]) -> Iterator[None]:
        """The layers inside act on these rows of the batch with each row's adapters and guides."""
        rows = [batch.rows[index] for index in indices]
        conditions = [batch.conditions[index] for index in indices]
        references = [_moved(batch.references[index], indices) for index in indices]
        is_usual = not (any(conditions) or any(references) or any(row.adapters.norms for row in rows))
        with (
            self.denoiser.steered([row.adapters.loras for row in rows], is_usual=is_usual),
            self._norms.rows([row.adapters.norms for row in rows]),
            self._embedder.rows([row.embedding for row in rows]),
            self._attention.rows(batch.text_length, conditions, references),
        ):
            yield

    def _reusing(
        self, batch: "_Batch", known: Sequence[Remembered | None], step: Sequence[int]
    ) -> tuple[Tensor, list[Remembered | None]]:
        """The velocity of all rows; only those go through all blocks that must. And what they remember."""
        everyone = range(len(batch.rows))
        with self._steered(batch, everyone):
            under, first = begin(self._transformer, batch.inputs, batch.blocks)
        kept = _reusable(batch.rows, known, first, step)
        whole = [index for index in everyone if index not in kept]
        image = {index: under.image[index] + remembered.others for index, remembered in kept.items()}
        if whole:
            with self._steered(batch, whole):
                found = others(self._transformer, under, whole, batch.blocks, batch.single_blocks)
            image |= zip(whole, found, strict=True)
        memories = list(known)
        for index in whole:
            if index < len(known) and batch.rows[index].reuse is not None:
                added = image[index] - under.image[index]
                memories[index] = Remembered(step[index], first[index].clone(), added)
        with self._steered(batch, everyone):
            joined = found if len(whole) == len(image) else torch.stack([image[index] for index in everyone])
            return end(self._transformer, joined, under.time), memories

    @torch.inference_mode()
    def warm(self, grid: Grid, text_length: int, rows: int) -> None:
        """Compile, and capture, what forwards of so many rows will need, with LoRAs and without."""
        config = self._transformer.config
        draw = partial(torch.randn, generator=torch.Generator("cpu").manual_seed(0))
        text = Conditioning(
            draw(text_length, config.joint_attention_dim).to(self._device, self._dtype),
            draw(config.pooled_projection_dim).to(self._device, self._dtype),
        )
        asked = [Row(0.5, text, 3.5, Adapters())] * rows
        noise = draw(grid.tokens, config.in_channels).to(self._device)
        batch = self._batch(asked, [None] * rows, self._inputs(asked, [noise] * rows, grid), grid)
        inputs = {
            **batch.inputs,
            "controlnet_block_samples": None,
            "controlnet_single_block_samples": None,
        }
        for width in self.denoiser.widths:
            with self.denoiser.staging(rows, width):
                self.denoiser(inputs)
                self.denoiser.capture(inputs, batch.key)

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

    def _key_values(self, row: Row, attended: Attended) -> KeyValues:
        """Computed here when first needed: on this thread, where no forward's adapters are in the way."""
        if attended.key_values is None:
            with self._bank.rows([row.adapters.loras]), self._norms.rows([row.adapters.norms]):
                attended.key_values = easycontrol.keys_values(
                    self._transformer, attended.condition, row.guidance, row.conditioning.pooled
                )
        return attended.key_values


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """The rows of a forward, those of references among them, and all that they need."""

    rows: Sequence[Row]
    references: Sequence[Reference | None]
    conditions: Sequence[Sequence[KeyValues]]
    inputs: dict[str, Any]
    blocks: Residuals
    single_blocks: Residuals
    grid: Grid

    @property
    def text_length(self) -> int:
        return len(self.rows[0].conditioning.tokens)

    @property
    def key(self) -> Hashable:
        """Of its captured forward; None for one that nobody captures."""
        if self.blocks or self.single_blocks or any(row.embedding is not None for row in self.rows):
            return None
        return self.grid, self.text_length, len(self.rows)


def _reusable(
    rows: Sequence[Row], known: Sequence[Remembered | None], first: Tensor, step: Sequence[int]
) -> dict[int, Remembered]:
    """Which rows may reuse what they remember. Asks the device once for all of them."""
    asking = {
        index: remembered
        for index, remembered in enumerate(known)
        # a step that runs again, because its batch failed, must not reuse itself
        if rows[index].reuse is not None and remembered and remembered.step < step[index]
    }
    if not asking:
        return {}
    differences = torch.stack([each.difference(first[index]) for index, each in asking.items()]).tolist()
    return {
        index: remembered
        for (index, remembered), difference in zip(asking.items(), differences, strict=True)
        if (threshold := rows[index].reuse) is not None and difference < threshold
    }


def _moved(reference: Reference | None, indices: Sequence[int]) -> Reference | None:
    """The same where only these rows are there; rows with references, and theirs, always go together."""
    return reference and replace(reference, row=list(indices).index(reference.row))


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
