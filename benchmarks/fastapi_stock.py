"""diffusers' pipeline behind a lock in FastAPI: `python -m benchmarks.fastapi_stock PORT LORAS`, for
benchmarks.servers."""

import sys
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from benchmarks import stock


def build(loras: Path) -> FastAPI:
    app, model, lock = FastAPI(), stock.Stock(loras), Lock()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.post("/noop")
    async def noop() -> dict[str, str]:
        return {"status": "COMPLETED"}

    @app.post("/predict")
    def predict(fields: dict[str, Any]) -> dict[str, str]:
        request = stock.read(fields)
        with lock:
            return model.answer([request])[0]

    return app


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvicorn.run(build(Path(sys.argv[2])), port=int(sys.argv[1]), log_level="warning", access_log=False)
