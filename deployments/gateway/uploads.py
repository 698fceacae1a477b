"""Uploads as fal's clients make them: they begin at the REST service or at the CDN, and end in a file URL.

JavaScript, and Python's fallback, begin with their key and get a URL that carries a ticket:

    POST /rest/storage/upload/initiate             → upload_url = /files/KEY?ticket=…
    PUT  /files/KEY?ticket=…                       the file
    PUT  /files/KEY/3?ticket=…                     or its parts, and then
    POST /files/KEY/complete?ticket=…

Python gets a pass with its key, shows it to the CDN, and has a ticket as the id of an upload in parts:

    POST /rest/storage/auth/token
    POST /files/upload
    POST /files/upload/multipart                   → access_url = /files/KEY, uploadId = the ticket
    PUT  /files/KEY/multipart/TICKET/3
    POST /files/KEY/multipart/TICKET/complete
"""

import re
from datetime import UTC, datetime

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.files.uploads import MAX_PARTS, TICKET_S, Ticket
from deployments.gateway import answers, body, lifecycle, validation, wishes
from deployments.gateway.gateway import Gateway
from deployments.gateway.keys import Keys
from schemas.errors import BadRequest, Forbidden, NotFound

MAX_JSON_BYTES = 2 * 2**20  # ten thousand parts, and then some
UNKNOWN = "application/octet-stream"

_TOKEN = r"[A-Za-z0-9!#$&^_.+-]{1,100}"
_CONTENT_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}(\s*;\s*[\x20-\x7e]{{1,200}})?")


class _Initiate(BaseModel):
    content_type: str = UNKNOWN
    file_name: str | None = None


class _Part(BaseModel):
    partNumber: int = Field(ge=1, le=MAX_PARTS)
    etag: str


class _Complete(BaseModel):
    parts: list[_Part] = Field(min_length=1, max_length=MAX_PARTS)


def routes(gateway: Gateway, keys: Keys) -> list[Route]:
    """Where files are sent."""
    http = _Uploads(gateway, keys)
    begun = "/files/{key}/multipart/{ticket}"
    return [
        Route("/rest/storage/upload/initiate", http.initiate, methods=["POST"]),
        Route("/rest/storage/upload/initiate-multipart", http.initiate, methods=["POST"]),
        Route("/rest/storage/auth/token", http.token, methods=["POST"]),
        Route("/files/upload", http.upload, methods=["POST"]),
        Route("/files/upload/multipart", http.begin, methods=["POST"]),
        Route("/files/{key}", http.whole, methods=["PUT"]),
        Route("/files/{key}/complete", http.complete, methods=["POST"]),
        Route("/files/{key}/{number}", http.part, methods=["PUT"]),
        Route(f"{begun}/complete", http.complete, methods=["POST"]),
        Route(f"{begun}/{{number}}", http.part, methods=["PUT"]),
    ]


class _Uploads:
    def __init__(self, gateway: Gateway, keys: Keys) -> None:
        self._uploads = gateway.uploads
        self._files = gateway.files
        self._public_url = gateway.settings.public_url
        self._keep_s = gateway.settings.keep.files_s
        self._keys = keys

    async def initiate(self, request: Request) -> Response:
        wish = validation.read(_Initiate, await _json(request))
        ticket = await self._begin(request, wish.file_name, wish.content_type)
        file_url = self._url(request, ticket)
        return answers.Json(
            {"upload_url": f"{file_url}?ticket={self._uploads.sign(ticket)}", "file_url": file_url}
        )

    async def token(self, request: Request) -> Response:
        issued = self._uploads.issue()
        return answers.Json(
            {
                "token": self._uploads.sign(issued),
                "token_type": "Bearer",
                "base_url": f"{self._base_url(request)}/cdn",
                "created_at": _iso(issued.until - TICKET_S),
                "expires_at": _iso(issued.until),
            }
        )

    async def upload(self, request: Request) -> Response:
        await self._admit(request)
        return await self._receive(request, await self._announced(request))

    async def begin(self, request: Request) -> Response:
        await self._admit(request)
        ticket = await self._announced(request)
        url = self._url(request, ticket)
        return answers.Json({"access_url": url, "uploadId": self._uploads.sign(ticket)})

    async def whole(self, request: Request) -> Response:
        ticket = self._ticket(request)
        given = request.headers.get("content-type", ticket.content_type)
        if given.strip().lower() != ticket.content_type.lower():
            raise Forbidden(f"This upload URL was signed for {ticket.content_type}, not for {given[:200]!r}.")
        return await self._receive(request, ticket)

    async def part(self, request: Request) -> Response:
        ticket = self._ticket(request)
        number = _number(request.path_params["number"])
        tag = await self._kept(request, ticket, number)
        return answers.Json({"partNumber": number, "etag": tag}, 200, {"etag": f'"{tag}"'})

    async def complete(self, request: Request) -> Response:
        ticket = self._ticket(request)
        wish = validation.read(_Complete, await _json(request))
        parts = {each.partNumber: each.etag.strip('"') for each in wish.parts}
        await self._uploads.complete(ticket, parts)
        return self._done(request, ticket)

    async def _begin(self, request: Request, name: str | None, content_type: str) -> Ticket:
        if not _CONTENT_TYPE.fullmatch(content_type):
            raise BadRequest(f"{content_type[:200]!r} is no content type.")
        keep_s = lifecycle.keep_s(request.headers, lifecycle.UPLOADED, lifecycle.PREFERRED)
        return await self._uploads.begin(name, content_type, keep_s or self._keep_s)

    async def _announced(self, request: Request) -> Ticket:
        """A ticket for what the headers tell of the file."""
        headers = request.headers
        return await self._begin(
            request, headers.get("x-fal-file-name"), headers.get("content-type") or UNKNOWN
        )

    async def _receive(self, request: Request, ticket: Ticket) -> Response:
        """The whole file: an upload of one part."""
        await self._uploads.complete(ticket, {1: await self._kept(request, ticket, 1)})
        return self._done(request, ticket)

    async def _kept(self, request: Request, ticket: Ticket, number: int) -> str:
        declared = body.length(request.headers.get("content-length"))
        return await self._uploads.receive(ticket, number, request.stream(), declared)

    def _done(self, request: Request, ticket: Ticket) -> Response:
        return answers.Json({"access_url": self._url(request, ticket), "uploaded": True})

    def _ticket(self, request: Request) -> Ticket:
        text = request.path_params.get("ticket") or request.query_params.get("ticket", "")
        return self._uploads.ticket(text, request.path_params["key"])

    async def _admit(self, request: Request) -> None:
        """Who has a pass may send, and who has a key. Raises what Keys.actor does."""
        given = request.headers.getlist("authorization")
        if not any(self._uploads.admits(each.strip().partition(" ")[2].strip()) for each in given):
            await self._keys.actor(given, request.state.address)

    def _url(self, request: Request, ticket: Ticket) -> str:
        return self._files.url(ticket.key, self._base_url(request))

    def _base_url(self, request: Request) -> str:
        return self._public_url or wishes.base_url(request)


async def _json(request: Request) -> dict[str, object]:
    declared = request.headers.get("content-length")
    return body.parse(await body.read(request.stream(), declared, MAX_JSON_BYTES))


def _number(text: str) -> int:
    """A part's number, in any case one that can be read. Raises NotFound."""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise NotFound(f"Part {text[:20]!r} not found")
    return int(text)


def _iso(seconds: float) -> str:
    """With an explicit offset, which fal's Python client insists on."""
    return datetime.fromtimestamp(int(seconds), UTC).isoformat()
