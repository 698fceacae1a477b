"""The Hub, and any other server of files, on a real socket."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote


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
        """A repository of safetensors: `folder__name=…` is folder/name.safetensors."""
        self.put_files(repo, {f"{name.replace('__', '/')}.safetensors": data for name, data in files.items()})

    def put_files(self, repo: str, files: Mapping[str, bytes], has_sizes: bool = True) -> None:
        """A repository of any files. It always has a README besides."""
        listed = {"README.md": b"", **files}
        sizes = {name: {"size": len(data)} if has_sizes else {} for name, data in listed.items()}
        siblings = [{"rfilename": name, **size} for name, size in sizes.items()]
        self.files[listing(repo)] = json.dumps({"id": repo, "siblings": siblings}).encode()
        self.files |= {f"/{repo}/resolve/main/{quote(name)}": data for name, data in files.items()}

    def put_folder(self, repo: str, folder: Path) -> None:
        """A repository with the files of a folder."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self.put_files(repo, {str(path.relative_to(folder)): path.read_bytes() for path in paths})

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


def listing(repo: str) -> str:
    """Where the Hub tells of a repository's files."""
    return f"/api/models/{repo}?blobs=true"


@asynccontextmanager
async def serving() -> AsyncIterator[Hub]:
    """A hub at a port of its own, until the end of the block."""
    hub = Hub()
    server = await asyncio.start_server(hub.serve, "127.0.0.1", 0)
    hub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield hub
