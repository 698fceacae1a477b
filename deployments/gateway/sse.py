"""Server-sent events (WHATWG HTML, section 9.2)."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

# A comment after so long without an event keeps the connection open. OkHttp, on which fal's Java and Kotlin
# clients stand, gives one up that is silent for 10 s.
PING_S = 5.0


class EventStream(StreamingResponse):
    """An answer of one event a document. It closes with the last one.

    `closed` is called when the answer is over, however it ends, even before its first byte.
    """

    def __init__(
        self,
        documents: AsyncIterator[Mapping[str, Any]],
        headers: Mapping[str, str],
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        told = {**headers, "cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(_frames(documents), media_type="text/event-stream", headers=told)
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closed()


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
