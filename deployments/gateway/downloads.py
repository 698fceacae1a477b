"""Files to whoever knows their names.

A file in a bucket is read from there: its URL, which is good for as long as the file is, answers with a
redirect to one that is good for a while.
"""

import re
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from deployments.files import shown
from deployments.files.store import FileStore, StoredFile
from schemas.errors import NotFound

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


def routes(files: FileStore) -> list[Route]:
    """Where files are read."""

    async def file(request: Request) -> Response:
        key = request.path_params["key"]
        if request.method == "GET" and (place := await files.redirect(key)):
            return RedirectResponse(
                place.url, 302, {"cache-control": f"private, max-age={place.lasts_s // 2}"}
            )
        found = await files.open(key)
        if found is None:
            raise NotFound("File not found")
        # Not by `media_type`, which adds a charset: the type is told as the sender gave it.
        headers = _headers(found)
        if _names(request.headers.get("if-none-match", ""), headers["etag"]):
            told = ("etag", "cache-control")
            return Response(status_code=304, headers={name: headers[name] for name in told})
        if request.method == "HEAD":
            return Response(headers=headers)
        is_same = request.headers.get("if-range", headers["etag"]) == headers["etag"]
        asked = _span(request.headers.get("range", ""), found.size) if is_same else None
        if asked is None:
            return StreamingResponse(await _begun(found.chunks), headers=headers)
        start, end = asked
        if start >= end:
            return Response(status_code=416, headers={"content-range": f"bytes */{found.size}"})
        headers |= {
            "content-length": str(end - start),
            "content-range": f"bytes {start}-{end - 1}/{found.size}",
        }
        return StreamingResponse(await _begun(files.read(key, start, end)), 206, headers)

    return [Route("/files/{key}", file)]


async def _begun(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same chunks, of which the first is there: a store that cannot be read is told by a status."""
    first = await anext(chunks, b"")

    async def from_the_first() -> AsyncIterator[bytes]:
        yield first
        async for chunk in chunks:
            yield chunk

    return from_the_first()


def _span(text: str, size: int) -> tuple[int, int] | None:
    """From where to before where a Range header asks; empty if the file has nothing there. None for all
    of it, as for several ranges at once and for what is no range."""
    match = _RANGE.fullmatch(text)
    if match is None or not any(match.groups()):
        return None
    first, last = (int(each) if each else None for each in match.groups())
    if first is None:
        return max(0, size - (last or 0)), size
    return first, size if last is None else min(last + 1, size)


def _names(text: str, etag: str) -> bool:
    """Whether an If-None-Match header has the tag. A weak one will do."""
    return text.strip() == "*" or etag in (each.strip().removeprefix("W/") for each in text.split(","))


def _headers(found: StoredFile) -> dict[str, str]:
    return {
        **shown.headers(found.content_type, found.name, found.left_s),
        "content-length": str(found.size),
        "accept-ranges": "bytes",
        "etag": f'"{found.tag}"',
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; sandbox",
    }
