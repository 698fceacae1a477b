"""The playground: pages for people, which are clients of the public API like any other.

They hold nothing of anyone, so whoever comes may have them; what they ask the API for needs the key that
their reader gives them. A page runs only scripts of this server, shows only pictures of this server, and
lies in no frame. Its addresses are relative, so that a proxy in front may put the server below a prefix.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from deployments.gateway.gateway import Gateway
from schemas.errors import NotFound

PATH = "/playground"
FOLDER = Path(__file__).parents[1] / "playground"

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class _Page:
    content: bytes
    content_type: str
    etag: str


def is_visit(scope: Scope) -> bool:
    """Whether a browser comes to the front door, with nothing but the server's address."""
    if scope["type"] != "http" or scope["path"] != "/" or scope["method"] not in ("GET", "HEAD"):
        return False
    headers = Headers(scope=scope)
    return "text/html" in headers.get("accept", "") and "authorization" not in headers


def routes(gateway: Gateway) -> list[Route]:
    """The gallery of models, a page for each endpoint, and what the pages are made of."""
    pages = {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in _TYPES}

    async def answer(request: Request, page: _Page, status: int = 200) -> Response:
        """Pictures may come from wherever this server's own URLs lead."""
        places = (gateway.settings.public_url, await gateway.files.leads_to())
        return _answer(request, page, status, _headers(filter(None, places)))

    async def shown(request: Request, name: str, status: int = 200) -> Response:
        return await answer(request, _below(request, pages[name]), status)

    async def gallery(request: Request) -> Response:
        return await shown(request, "gallery.html")

    async def endpoint(request: Request) -> Response:
        """The page is the same for every endpoint, and says itself where there is none."""
        is_served = request.path_params["endpoint_id"].strip("/") in gateway.endpoints
        return await shown(request, "endpoint.html", 200 if is_served else 404)

    async def part(request: Request) -> Response:
        page = pages.get(request.path_params["name"])
        if page is None:
            raise NotFound("Page not found")
        return await answer(request, page)

    return [
        Route(PATH, gallery),
        Route(f"{PATH}/", gallery),
        Route(f"{PATH}/static/{{name}}", part),
        Route(f"{PATH}/{{endpoint_id:path}}", endpoint),
    ]


def _read(path: Path) -> _Page:
    return _page(path.read_bytes(), f"{_TYPES[path.suffix]}; charset=utf-8")


def _below(request: Request, page: _Page) -> _Page:
    """The page with its addresses, which begin at the server's root, as they are from where it is shown."""
    depth = request.scope["raw_path"].count(b"/") - 1  # as the browser counts: %2F is no step down
    return _page(page.content.replace(b'="/', b'="' + b"../" * depth), page.content_type)


def _page(content: bytes, content_type: str) -> _Page:
    return _Page(content, content_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _headers(places: Iterable[str]) -> dict[str, str]:
    """`places`: URLs of other hosts that show this server's pictures."""
    hosts = (urlsplit(each) for each in places)
    elsewhere = "".join(f" {each.scheme}://{each.netloc}" for each in hosts)
    policy = (
        "default-src 'self'",
        f"img-src 'self' data:{elsewhere}",
        "connect-src 'self'",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # text becomes markup nowhere: the browser sees to it
        "trusted-types 'none'",
    )
    return {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",  # kept, and asked after
    }


def _answer(request: Request, page: _Page, status: int, headers: dict[str, str]) -> Response:
    told = {**headers, "etag": page.etag}
    if status == 200 and request.headers.get("if-none-match") == page.etag:
        return Response(status_code=304, headers=told)
    return Response(page.content, status, {**told, "content-type": page.content_type})
