"""Server-sent events (WHATWG HTML, section 9.2)."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse

PING_S = 15.0  # a comment after so long without an event keeps the connection open


def stream(documents: AsyncIterator[Mapping[str, Any]], headers: Mapping[str, str]) -> StreamingResponse:
    """An answer of one event a document. It closes with the last one."""
    told = {**headers, "cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_frames(documents), media_type="text/event-stream", headers=told)


async def _frames(documents: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    following = asyncio.ensure_future(anext(documents, None))
    try:
        while True:
            done, _ = await asyncio.wait([following], timeout=PING_S)
            if not done:
                yield b": ping\n\n"
                continue
            document = following.result()
            if document is None:
                return
            yield f"data: {json.dumps(document, separators=(',', ':'))}\n\n".encode()
            following = asyncio.ensure_future(anext(documents, None))
    finally:
        following.cancel()
