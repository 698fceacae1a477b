"""A server's folders, and what is asked of its weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from deployments.files.cache import Lease
from deployments.files.fetch import Fetcher
from deployments.files.store import open_files
from deployments.files.weights import Weights
from schemas.assets import Asset, AssetKind
from schemas.errors import AssetError
from schemas.settings import BaseSettings, FetchSettings, ModelSettings, WeightSettings

BASE = "http://box:8000"


def safetensors(size: int = 0, fill: bytes = b"x") -> bytes:
    """A file with a header, and `size` bytes of data."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + fill * size


class Place:
    """The folders of one server."""

    def __init__(self, folder: Path, hub_url: str) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.hub_url = hub_url
        self.files = open_files(f"file://{folder}/files")

    def open(
        self,
        fresh_s: float = 600,
        fetch: dict[str, Any] | None = None,
        bases: dict[str, Any] | None = None,
        faces: dict[str, str] | None = None,
        model: str = "unused",
        **changes: Any,
    ) -> Weights:
        inside = {"allowed_networks": ("127.0.0.0/8",), "allowed_ports": ()}
        settings = ModelSettings(
            model=model,
            endpoints=("unused",),
            fetch=FetchSettings.model_validate(inside | (fetch or {})),
            weights=WeightSettings(**{"cache": f"file://{self.cache}", "hub_url": self.hub_url} | changes),
            bases=BaseSettings.model_validate(bases or {}),
            faces=faces or {},
        )
        return Weights(Fetcher(self.files, settings.fetch), settings, self.source, fresh_s)

    def source(self, name: str) -> Path | str:
        """What an operator's word leads to: to zoo:NAME there is a folder of that name."""
        path = self.folder / name.removeprefix("zoo:") if name.startswith("zoo:") else Path(name)
        return path if path.exists() else name

    def kept(self, suffix: str = ".safetensors") -> set[str]:
        return {path.name for path in self.cache.iterdir() if path.suffix == suffix}


def name_of(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.safetensors"


Source = str | Asset  # a word alone means a LoRA


async def get(weights: Weights, source: Source, base_url: str = BASE) -> Lease:
    asset = source if isinstance(source, Asset) else Asset(AssetKind.LORA, source)
    return await weights.locate(asset, base_url, lambda line: None)


async def read(weights: Weights, source: Source) -> bytes:
    with await get(weights, source) as path:
        return path.read_bytes()


async def fails(
    weights: Weights, source: Source, *words: str, kind: str = "file_download_error"
) -> AssetError:
    with pytest.raises(AssetError) as failed:
        await get(weights, source)
    assert failed.value.kind == kind
    for word in words:
        assert word in failed.value.message
    return failed.value
