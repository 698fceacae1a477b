"""A UNet with everything that may steer a row of its forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.adapters.bank import LoraBank
from pipelines.sd.controlnet import residuals
from pipelines.sd.image_attention import ImageAttention
from pipelines.sd.plan import Row


class AdaptedUnet:
    """A UNet2DConditionModel whose rows each have their own timestep, text, adapters and controls.

    Its parameters stay as they were loaded. `bank` holds LoRAs beside its layers. A forward holds at most
    `budget` image tokens, or one row. Used by one thread.
    """

    def __init__(self, unet: Any, bank: LoraBank, budget: int) -> None:
        self._unet = unet
        self._budget = budget
        self._pictures = ImageAttention(unet)
        self._device: torch.device = unet.device  # diffusers looks for them in every module
        self._dtype: torch.dtype = unet.dtype
        self._bank = bank
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
        size = (rows[0].latents.shape[-2], rows[0].latents.shape[-1])
        with (
            self._bank.rows([row.loras for row in rows]),
            self._pictures.rows([row.pictures for row in rows], size),
        ):
            prediction: Tensor = self._unet(
                **inputs,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        return prediction.float().unbind()

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
