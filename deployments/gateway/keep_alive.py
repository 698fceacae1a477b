"""A JSON answer that takes long: spaces, now and then, until it is there.

Leading whitespace is legal JSON, and keeps proxies and clients from giving the connection up (Node's fetch
does after 300 s). The price: the status, 200, has gone out. An answer that turns out to be an error is not
sent in its name; the connection breaks off, and a client that tries again gets the error with its status.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.gateway import answers
from deployments.gateway.abandoned import while_connected
from deployments.gateway.attendance import Visit
from schemas.errors import BrokenOff

SPACE_S = 15.0  # between two spaces


class KeptAlive(StreamingResponse):
    """The output that a caller waits for. The visit ends with it, and is served if it was given whole."""

    def __init__(self, visit: Visit, headers: Mapping[str, str]) -> None:
        told = {**headers, "x-accel-buffering": "no"}
        super().__init__(_text(visit), media_type="application/json", headers=told)
        visit.goes_on = True
        self._visit = visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self.stream_response(send))
        finally:
            self._visit.end()


async def _text(visit: Visit) -> AsyncIterator[bytes]:
    while not visit.result.done():
        yield b" "
        await asyncio.wait([visit.result], timeout=SPACE_S)
    found = visit.result.result()
    if found.error_type is not None:
        raise BrokenOff(f"the answer became {found.status}: {found.error}")
    yield bytes(answers.Json(found.body).body)
    visit.is_served = True
