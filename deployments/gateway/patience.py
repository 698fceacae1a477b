"""A body must come at some pace: who sends a byte a minute holds a connection for nothing."""

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.errors import TooSlow


class Patience:
    """Middleware. Only the time in which we wait for the caller counts, never what we do with its bytes."""

    def __init__(self, app: ASGIApp, grace_s: float, bytes_per_s: float) -> None:
        self._app = app
        self._grace_s = grace_s
        self._bytes_per_s = bytes_per_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        waited_s, count, is_whole = 0.0, 0, False

        async def paced() -> Message:
            nonlocal waited_s, count, is_whole
            if is_whole:
                return await receive()
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._grace_s + count / self._bytes_per_s - waited_s):
                    message = await receive()
            except TimeoutError:
                raise TooSlow("The body came too slowly; send it again at once.") from None
            waited_s += time.monotonic() - began
            count += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            return message

        await self._app(scope, paced, send)
