"""diffusers' pipelines in Ray Serve: `python -m benchmarks.ray_stock PORT BATCH LORAS`, for
benchmarks.servers.

An ingress calls a model by its handle, which batches. Without an access log; the environment chooses
the rest.
"""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import JSONResponse

from benchmarks import stock

BATCH_TIMEOUT_S = 0.05  # a batch that is full leaves at once
MOST_AT_ONCE = 100


class Ingress:
    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    async def __call__(self, request: Request) -> JSONResponse:
        if request.url.path == "/predict":
            return JSONResponse(await self._model.remote(await request.json()))
        return JSONResponse({"status": "COMPLETED"})


class Model:
    def __init__(self, batch: int, loras: str) -> None:
        torch.set_num_threads(1)
        self._stock = stock.Stock(Path(loras))
        self._answer.set_max_batch_size(batch)

    async def __call__(self, fields: dict[str, Any]) -> dict[str, str]:
        answer: dict[str, str] = await self._answer(stock.read(fields))
        return answer

    @serve.batch(batch_wait_timeout_s=BATCH_TIMEOUT_S)  # type: ignore[untyped-decorator]  # ray is untyped here
    async def _answer(self, requests: list[stock.Request]) -> list[dict[str, str]]:
        return await asyncio.to_thread(self._stock.answer, requests)


def main(port: int, batch: int, loras: str) -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=4)
    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=port))
    model = serve.deployment(Model, max_ongoing_requests=MOST_AT_ONCE).bind(batch, loras)
    ingress = serve.deployment(Ingress, max_ongoing_requests=MOST_AT_ONCE).bind(model)
    serve.run(ingress, logging_config=LoggingConfig(enable_access_log=False))
    signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
