"""diffusers' pipeline in LitServe with dynamic batching, for benchmarks.stable_diffusion, which starts it:
`python -m benchmarks.litserve_stock PORT BATCH`. The one file that imports litserve."""

import os
import sys
from base64 import b64encode
from typing import Any

import torch
from litserve import LitAPI, LitServer
from PIL.Image import Image as Picture

from benchmarks.stable_diffusion import Stock
from schemas.endpoints.fast_sdxl_controlnet_canny_image_to_image import Input

BATCH_TIMEOUT_S = 0.05  # a batch that is full leaves at once


class StockApi(LitAPI):  # type: ignore[misc]  # litserve is untyped here
    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self._stock = Stock()

    def decode_request(self, request: dict[str, Any]) -> Input:
        return Input.model_validate(request)

    def predict(self, asked: list[Input] | Input) -> list[Picture] | Picture:
        """A batch, or one request where batches are of one."""
        return self._stock.draw(asked) if isinstance(asked, list) else self._stock.draw([asked])[0]

    def encode_response(self, picture: Picture) -> dict[str, Any]:
        pixels = b64encode(picture.tobytes()).decode()
        return {"worker": os.getpid(), "size": picture.size, "pixels": pixels}


if __name__ == "__main__":
    port, batch = map(int, sys.argv[1:])
    api = StockApi(max_batch_size=batch, batch_timeout=BATCH_TIMEOUT_S if batch > 1 else 0.0)
    LitServer(api, accelerator="cpu", timeout=False).run(
        host="127.0.0.1", port=port, log_level="warning", generate_client_file=False
    )
