"""A reverse proxy that shows a server below a path prefix, as nginx does with `location /darkroom/`."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE"]
# What tells of one connection, not of the message. The host is that of the server.
_OWN = ("host", "connection", "transfer-encoding", "content-length")


@dataclass
class Prefixed:
    prefix: str  # without a slash at its end
    server: str = ""  # what it stands before, once that has a URL
    strays: list[str] = field(default_factory=list)  # paths asked for that do not lead below the prefix

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self._forward, methods=METHODS)])

    async def _forward(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode()
        below = path.removeprefix(self.prefix)
        if below == path or not below.startswith("/"):
            self.strays.append(path)
            return PlainTextResponse("nothing here", 404)
        query = f"?{request.url.query}" if request.url.query else ""
        headers = [each for each in request.headers.items() if each[0] not in _OWN]
        http = httpx.AsyncClient(timeout=60)
        asked = http.build_request(
            request.method, f"{self.server}{below}{query}", headers=headers, content=await request.body()
        )
        answer = await http.send(asked, stream=True)

        async def parts() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_raw():
                    yield part
            finally:
                await answer.aclose()
                await http.aclose()

        kept = {name: value for name, value in answer.headers.items() if name not in _OWN}
        return StreamingResponse(parts(), answer.status_code, kept)
