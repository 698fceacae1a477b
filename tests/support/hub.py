"""The Hub, and any other server of files, on a real socket."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Hub:
    """A server of files and of the Hub's two addresses, which counts what it is asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.has_tags = True
        self.pause_s = 0.0
        self.url = ""

    def put(self, repo: str, **files: bytes) -> None:
        names = {name.replace("__", "/") + ".safetensors": data for name, data in files.items()}
        siblings = [{"rfilename": name} for name in ("README.md", *names)]
        self.files[f"/api/models/{repo}"] = json.dumps({"id": repo, "siblings": siblings}).encode()
        self.files |= {f"/{repo}/resolve/main/{name}": data for name, data in names.items()}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split()[1]
            self.asked[path] += 1
            await asyncio.sleep(self.pause_s)
            writer.write(self.answer(path, head))
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()

    def answer(self, path: str, head: str) -> bytes:
        body = self.files.get(path)
        tag = f'"{hashlib.md5(body or b"").hexdigest()}"'
        status = 404 if body is None else 304 if self.has_tags and tag in head else 200
        self.statuses[status] += 1
        etag = f"ETag: {tag}\r\n" if self.has_tags else ""
        sent = body if status == 200 and body else b""
        return f"HTTP/1.1 {status} X\r\n{etag}Content-Length: {len(sent)}\r\n\r\n".encode() + sent


@asynccontextmanager
async def serving() -> AsyncIterator[Hub]:
    """A hub at a port of its own, until the end of the block."""
    hub = Hub()
    server = await asyncio.start_server(hub.serve, "127.0.0.1", 0)
    hub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield hub
