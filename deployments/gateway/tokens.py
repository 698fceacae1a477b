"""Tokens for browsers: who has a key asks for one, and hands it out.

fal has two forms of the request. The older, which its clients send, is answered with the bare token.
"""

from urllib.parse import parse_qs

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.gateway import answers, body, validation
from deployments.gateway.keys import ANYONE, Keys

QUERY = "fal_jwt_token"  # how a client shows a token
DEFAULT_S = 120
MAX_S = 24 * 3600
MAX_APPS = 8
MAX_JSON_BYTES = 2**16


class _Wish(BaseModel):
    allowed_apps: list[str] = Field(min_length=1, max_length=MAX_APPS)
    token_expiration: int | None = Field(None, ge=1, le=MAX_S, description="seconds; the clients' name")
    duration: int | None = Field(None, ge=1, le=MAX_S, description="seconds; the newer name")


def routes(keys: Keys) -> list[Route]:
    """Where tokens are given."""

    async def issued(request: Request) -> str:
        declared = request.headers.get("content-length")
        data = body.parse(await body.read(request.stream(), declared, MAX_JSON_BYTES))
        wish = validation.read(_Wish, data)
        apps = [app[:100].strip("/") for app in wish.allowed_apps]
        return keys.issue(
            request.state.actor.key_id or ANYONE, apps, wish.duration or wish.token_expiration or DEFAULT_S
        )

    async def bare(request: Request) -> Response:
        return answers.Json(await issued(request))

    async def wrapped(request: Request) -> Response:
        return answers.Json({"token": await issued(request)})

    return [
        Route("/rest/tokens", bare, methods=["POST"]),
        Route("/rest/tokens/", bare, methods=["POST"]),
        Route("/rest/tokens/realtime", wrapped, methods=["POST"]),
        Route("/rest/tokens/realtime/", wrapped, methods=["POST"]),
    ]


def token_in(query: str) -> str | None:
    """The token that a query shows."""
    return parse_qs(query).get(QUERY, [None])[0]


def covered(path: str) -> str:
    """What of a prefixed path a token has to cover: all from the endpoint id on. Empty for the services
    that take no tokens."""
    _, service, rest = [*path.split("/", 2), "", ""][:3]
    return rest if service in ("run", "queue") else ""
