"""Files to whoever knows their names. What a client has sent is shown, but never run."""

import re

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from deployments.files.store import FileStore, StoredFile
from schemas.errors import NotFound

# Browsers show these themselves; all else is saved, so that no page of a stranger's opens here.
_SHOWN = ("image/", "audio/", "video/", "text/plain")
_ACTIVE = ("image/svg",)  # may hold scripts

YEAR_S = 365 * 86_400

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


def routes(files: FileStore) -> list[Route]:
    """Where files are read."""

    async def file(request: Request) -> Response:
        key = request.path_params["key"]
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
            return StreamingResponse(found.chunks, headers=headers)
        start, end = asked
        if start >= end:
            return Response(status_code=416, headers={"content-range": f"bytes */{found.size}"})
        headers |= {
            "content-length": str(end - start),
            "content-range": f"bytes {start}-{end - 1}/{found.size}",
        }
        return StreamingResponse(files.read(key, start, end), 206, headers)

    return [Route("/files/{key}", file)]


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
        "content-type": found.content_type,
        "content-length": str(found.size),
        "accept-ranges": "bytes",
        "content-disposition": _disposition(found),
        "etag": f'"{found.tag}"',
        "cache-control": _cached(found.left_s),
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; sandbox",
    }


def _cached(left_s: float | None) -> str:
    """No cache may show a file longer than we do."""
    age_s = YEAR_S if left_s is None else min(YEAR_S, int(left_s))
    return f"public, max-age={age_s}, immutable"


def _disposition(found: StoredFile) -> str:
    kind = found.content_type.lower()
    is_shown = kind.startswith(_SHOWN) and not kind.startswith(_ACTIVE)
    name = f'; filename="{found.name}"' if found.name else ""
    return f"{'inline' if is_shown else 'attachment'}{name}"
