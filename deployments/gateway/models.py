"""What the server can do, told as fal's platform tells it: a list of models, and OpenAPI for each."""

import base64
import binascii
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.gateway import answers, openapi, wishes
from deployments.gateway.descriptions import Description, describe
from deployments.gateway.gateway import Gateway
from pipelines import registry
from schemas.errors import BadRequest, NotFound
from schemas.settings import ModelEntry

EXPANDED = "openapi-3.0"  # what `expand` takes
MAX_MODELS = 100  # in one answer
MAX_EXPANDED = 10


def routes(gateway: Gateway) -> list[Route]:
    """Where models are looked up."""
    http = _Models(gateway)
    return [
        Route("/v1/models", http.models),
        Route("/openapi/{endpoint_id:path}", http.openapi),
        Route("/api/openapi/queue/openapi.json", http.openapi),
    ]


class _Models:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def models(self, request: Request) -> Response:
        expands = _expands(request)
        limit = _limit(request, MAX_EXPANDED if expands else MAX_MODELS)
        after = _after(request.query_params.get("cursor"))
        found = [each for each in self._found(request) if each.id > after]
        page, has_more = found[:limit], len(found) > limit
        base_url = self._base_url(request)
        names = [] if request.query_params else [*self._gateway.settings.openai_models]
        return answers.Json(
            {
                "models": [
                    _model(each, self._gateway.entry(each.id), base_url, expands=expands) for each in page
                ],
                "next_cursor": _cursor(page[-1].id) if has_more else None,
                "has_more": has_more,
                "object": "list",  # from here on for OpenAI's clients, which ask at the same path
                "data": [_openai_model(each) for each in [*names, *(each.id for each in page)]],
            }
        )

    async def openapi(self, request: Request) -> Response:
        asked = request.path_params.get("endpoint_id") or request.query_params.get("endpoint_id", "")
        endpoint_id = asked.strip("/").removesuffix("/openapi.json")
        if endpoint_id not in self._gateway.endpoints:
            known = ", ".join(sorted(self._gateway.endpoints))
            raise NotFound(f"{endpoint_id[:200]!r} is not served here; known: {known}")
        endpoint = registry.endpoint(endpoint_id)
        example = self._gateway.entry(endpoint_id).example
        return answers.Json(openapi.document(endpoint, self._base_url(request), example))

    def _found(self, request: Request) -> list[Description]:
        """What is asked for, in the order of the ids."""
        query = request.query_params
        ids, words = query.getlist("endpoint_id"), query.get("q", "").lower().split()
        category, status = query.get("category"), query.get("status", "active")
        served = [describe(registry.endpoint(each)) for each in sorted(self._gateway.endpoints)]
        return [
            each
            for each in served
            if (not ids or each.id in ids)
            and (not category or each.category == category)
            and status == "active"
            and all(word in _text(each) for word in words)
        ]

    def _base_url(self, request: Request) -> str:
        return self._gateway.settings.public_url or wishes.base_url(request)


def _text(about: Description) -> str:
    """What a search looks at."""
    return " ".join((about.id, about.display_name, about.description, about.category)).lower()


def _model(about: Description, entry: ModelEntry, base_url: str, *, expands: bool) -> dict[str, Any]:
    told = {"license_type": entry.licence, "hardware": entry.hardware}
    model: dict[str, Any] = {
        "endpoint_id": about.id,
        "metadata": {
            "display_name": about.display_name,
            "category": about.category,
            "description": about.description,
            "status": "active",
            "tags": [],
            "updated_at": about.updated_at,
            "model_url": f"{base_url}/run/{about.id}",
            **{name: text for name, text in told.items() if text is not None},
        },
    }
    if expands:
        model["openapi"] = openapi.document(registry.endpoint(about.id), base_url, entry.example)
    return model


def _openai_model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "darkroom"}


def _expands(request: Request) -> bool:
    asked = [part for text in request.query_params.getlist("expand") for part in text.split(",") if part]
    if unknown := [part for part in asked if part != EXPANDED]:
        raise BadRequest(f"expand takes {EXPANDED} only, not {unknown[0][:40]!r}.")
    return bool(asked)


def _limit(request: Request, most: int) -> int:
    text = request.query_params.get("limit", str(most))
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise BadRequest(f"limit must be a whole number from 1 to {most}.")
    return int(text)


def _cursor(last: str) -> str:
    return base64.urlsafe_b64encode(last.encode()).decode()


def _after(cursor: str | None) -> str:
    """The id that a cursor stands behind."""
    try:
        return base64.b64decode((cursor or "").encode(), b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, UnicodeEncodeError):
        raise BadRequest("The cursor is not one that this server gave.") from None
