"""Pictures inside a request's own text go to the file store, so that the queue keeps only their URLs."""

import asyncio
from typing import Any

from deployments.files.fetch import decode_data_uri
from deployments.files.store import FileStore
from schemas.assets import Asset, AssetKind, assets
from schemas.errors import AssetError, FieldError, InputError, Location
from schemas.fields import EndpointInput
from schemas.settings import FrontSettings

KEEP_CHARACTERS = 4096  # shorter ones are no burden

_MAGIC = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


async def stored(
    request: EndpointInput,
    document: dict[str, Any],
    files: FileStore,
    base_url: str,
    settings: FrontSettings,
) -> dict[str, Any]:
    """The request's JSON with URLs below `base_url` where long data URIs of pictures stood.

    The pictures are kept as long as results are.

    Raises InputError for what is no picture that the workers read.
    """
    urls: dict[Asset, str] = {}  # a picture that several fields hold is kept once
    faults: list[FieldError] = []
    for ref in assets(request):
        if ref.asset.kind is AssetKind.IMAGE and _is_long(ref.asset.source):
            try:
                if ref.asset not in urls:
                    data = await asyncio.to_thread(
                        decode_data_uri, ref.asset.source, settings.max_image_bytes
                    )
                    key = await files.save(data, _content_type(data), settings.keep.results_s)
                    urls[ref.asset] = files.url(key, base_url)
                _replace(document, ref.loc, urls[ref.asset])
            except AssetError as error:
                faults += error.at(ref.loc).fields
    if faults:
        raise InputError(faults)
    return document


def _is_long(source: str) -> bool:
    return source[:5].lower() == "data:" and len(source) > KEEP_CHARACTERS


def _content_type(data: bytes) -> str:
    """By the first bytes, never by what the caller says."""
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            return kind
    formats = ["png", "jpeg", "webp"]
    message = "The file is not a picture that this server reads; send PNG, JPEG or WebP."
    raise AssetError(message, "unsupported_image_format", {"supported_formats": formats})


def _replace(document: dict[str, Any], loc: Location, url: str) -> None:
    """Put `url` where the request named the file. `loc` begins with "body"."""
    *path, last = loc[1:]
    place: Any = document
    for part in path:
        place = place[part]
    place[last] = url
