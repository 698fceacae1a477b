"""A UNet with everything that may steer a row of its forward."""

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from pipelines.adapters.bank import LoraBank
from pipelines.sd.controlnet import residuals
from pipelines.sd.image_attention import ImageAttention
from pipelines.sd.plan import Row
from pipelines.speed.denoiser import Denoiser
from schemas.settings import SpeedSettings

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # which are compiled


class AdaptedUnet:
    """A UNet2DConditionModel whose rows each have their own timestep, text, adapters and controls.

    Its parameters stay as they were loaded. `bank` holds LoRAs beside its layers. A forward holds at most
    `budget` image tokens, or one row. Used by one thread.
    """

    def __init__(self, unet: Any, bank: LoraBank, budget: int, speed: SpeedSettings) -> None:
        self._unet = unet
        self._budget = budget
        self._pictures = ImageAttention(unet)
        self._device: torch.device = unet.device  # diffusers looks for them in every module
        self._dtype: torch.dtype = unet.dtype
        self.denoiser = Denoiser(unet, bank, BLOCKS, speed)
        self._takes_pooled = unet.config.addition_embed_type == "text_time"

    def predict(self, rows: Sequence[Row]) -> list[Tensor]:
        """The prediction for each row's latents, [4, rows, columns], float32, by one forward if they fit.

        All rows have the same size and text length.
        """
        most = max(1, self._budget // rows[0].cost)
        parts = (rows[at : at + most] for at in range(0, len(rows), most))
        return [prediction for part in parts for prediction in self._forward(part)]

    def _forward(self, rows: Sequence[Row]) -> Sequence[Tensor]:
        inputs = self._inputs(rows)
        down, middle = residuals([row.controls for row in rows], inputs)
        is_usual = not any(any(prompt.scales) for row in rows for prompt in row.pictures)
        with (
            self.denoiser.steered([row.loras for row in rows], is_usual=is_usual),
            self._pictures.rows(
                [row.pictures for row in rows], (rows[0].latents.shape[-2], rows[0].latents.shape[-1])
            ),
        ):
            prediction = self.denoiser(*_keyed(inputs, down, middle, is_usual))
        return prediction.float().unbind()

    @torch.inference_mode()
    def warm(self, rows: Sequence[Row]) -> None:
        """Compile, and capture, what forwards like this need, with LoRAs and without, controlled and not."""
        inputs = self._inputs(rows)
        for down, middle in ((None, None), self._no_residuals(inputs)):
            given, key = _keyed(inputs, down, middle, True)
            for width in self.denoiser.widths:
                with self.denoiser.staging(len(rows), width):
                    self.denoiser(given)
                    self.denoiser.capture(given, key)

    def _no_residuals(self, inputs: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
        """What a ControlNet that does nothing would add."""
        shapes: list[torch.Size] = []
        blocks = [self._unet.conv_in, *self._unet.down_blocks, self._unet.mid_block]

        def note(_: Any, __: Any, output: Any) -> None:
            found = output[1] if isinstance(output, tuple) else [output]
            shapes.extend(each.shape for each in found)

        with ExitStack() as hooks, self.denoiser.staging(len(inputs["sample"]), 0):
            for block in blocks:
                hooks.callback(block.register_forward_hook(note).remove)
            self.denoiser(
                {**inputs, "down_block_additional_residuals": None, "mid_block_additional_residual": None}
            )
        *down, middle = (torch.zeros(shape, device=self._device, dtype=self._dtype) for shape in shapes)
        return down, middle

    def _inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What the UNet and the ControlNets are called with."""
        device, dtype = self._device, self._dtype
        return {
            "sample": torch.stack([row.latents for row in rows]).to(dtype),
            "timestep": torch.tensor([row.timestep for row in rows], device=device),
            "encoder_hidden_states": torch.stack([row.text.tokens for row in rows]),
            "added_cond_kwargs": self._added(rows) if self._takes_pooled else None,
        }

    def _added(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """SDXL's further conditions."""
        device, dtype = self._device, self._dtype
        pooled = [row.text.pooled for row in rows if row.text.pooled is not None]
        assert len(pooled) == len(rows), "every text of SDXL has a pooled embedding"
        time_ids = torch.tensor([row.time_ids for row in rows], device=device).to(dtype)
        return {"text_embeds": torch.stack(pooled), "time_ids": time_ids}


def _keyed(
    inputs: dict[str, Any], down: Any, middle: Tensor | None, is_usual: bool
) -> tuple[dict[str, Any], Hashable]:
    """What the UNet is called with, and the key of its captured forward."""
    given = {**inputs, "down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    shapes = inputs["sample"].shape, inputs["encoder_hidden_states"].shape, down is not None
    return given, shapes if is_usual else None
