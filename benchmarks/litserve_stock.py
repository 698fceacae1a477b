"""diffusers' pipelines in LitServe with dynamic batching: `python -m benchmarks.litserve_stock PORT BATCH`
and `sdxl` for benchmarks.stable_diffusion, or `flux` and a folder of LoRAs for benchmarks.servers.
The one file that imports litserve."""

import os
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from litserve import LitAPI, LitServer

from benchmarks import stable_diffusion, stock
from schemas.endpoints.fast_sdxl_controlnet_canny_image_to_image import Input

BATCH_TIMEOUT_S = 0.05  # a batch that is full leaves at once


class Model(Protocol):
    def read(self, fields: dict[str, Any]) -> Any: ...

    def answer(self, requests: Sequence[Any]) -> Sequence[Any]:
        """What JSON can hold, for each."""


class Flux:
    def __init__(self, loras: str) -> None:
        self.read = stock.read
        self.answer = stock.Stock(Path(loras)).answer


class Canny:
    """Answers with bare pixels."""

    def __init__(self) -> None:
        self.read = Input.model_validate
        self._stock = stable_diffusion.Stock()

    def answer(self, requests: Sequence[Input]) -> list[dict[str, Any]]:
        return [
            {"worker": os.getpid(), "size": each.size, "pixels": b64encode(each.tobytes()).decode()}
            for each in self._stock.draw(requests)
        ]


MODELS: dict[str, Callable[..., Model]] = {"flux": Flux, "sdxl": Canny}


class StockApi(LitAPI):  # type: ignore[misc]  # litserve is untyped here
    def __init__(self, kind: str, *args: str, **options: Any) -> None:
        super().__init__(**options)
        self._kind, self._args = kind, args

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self._model = MODELS[self._kind](*self._args)

    def decode_request(self, request: dict[str, Any]) -> Any:
        return self._model.read(request)

    def predict(self, asked: list[Any] | Any) -> Any:
        """A batch, or one request where batches are of one."""
        return self._model.answer(asked) if isinstance(asked, list) else self._model.answer([asked])[0]

    def encode_response(self, answer: Any) -> Any:
        return answer


def noop() -> dict[str, str]:
    return {"status": "COMPLETED"}


if __name__ == "__main__":
    port, batch = map(int, sys.argv[1:3])
    api = StockApi(*sys.argv[3:], max_batch_size=batch, batch_timeout=BATCH_TIMEOUT_S if batch > 1 else 0.0)
    server = LitServer(api, accelerator="cpu", timeout=False, fast_queue=True)
    server.app.post("/noop")(noop)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
