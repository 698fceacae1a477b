"""A caller's own past: the list of its requests, and the deletion of what one was about."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deployments.files.fetch import own_key
from deployments.gateway import answers
from deployments.gateway.addresses import check_request_id
from deployments.gateway.gateway import Gateway
from schemas.errors import BadRequest, DarkroomError
from schemas.jobs import Record

MAX_ITEMS = 100  # in one answer
DEFAULT_ITEMS = 20


def routes(gateway: Gateway) -> list[Route]:
    """Where a caller looks back. The longer path is fal's."""
    http = _History(gateway)
    return [
        Route("/v1/models/requests", http.requests),
        Route("/v1/models/requests/by-endpoint", http.requests),
        Route("/v1/models/requests/{request_id}/payloads", http.erase, methods=["DELETE"]),
    ]


class _History:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def requests(self, request: Request) -> Response:
        """Newest first; `expand=payloads` for inputs and outputs."""
        query = request.query_params
        limit = _number(query.get("limit", str(DEFAULT_ITEMS)), "limit", 1, MAX_ITEMS)
        before = _number(query["cursor"], "cursor", 0, 10**18) if "cursor" in query else None
        endpoints = query.getlist("endpoint_id")
        if any("\0" in each for each in endpoints):
            raise BadRequest("endpoint_id must be text without NUL.")
        found = await self._gateway.recent(request.state.tenant, limit + 1, before, endpoints)
        page, has_more = found[:limit], len(found) > limit
        expands = query.get("expand") == "payloads"
        return answers.Json(
            {
                "items": [_item(record, expands=expands) for _, record in page],
                "next_cursor": str(page[-1][0]) if has_more else None,
                "has_more": has_more,
            }
        )

    async def erase(self, request: Request) -> Response:
        """Delete input, output, log, and the files of the output. Files of the input are left: other
        requests may name them."""
        request_id = request.path_params["request_id"]
        check_request_id(request_id)
        record = await self._gateway.erase(request_id, request.state.actor)
        output = record.result.body if record.result is not None else {}
        links = dict.fromkeys(_urls(output))
        return answers.Json(
            {"cdn_delete_results": [await self._remove(link, record.job.base_url) for link in links]}
        )

    async def _remove(self, link: str, base_url: str) -> dict[str, str | None]:
        key = own_key(link, base_url)
        if key is None:
            return {"link": link, "exception": "not a file of this server"}
        try:
            await self._gateway.files.remove(key)
        except DarkroomError as error:
            return {"link": link, "exception": error.message}
        return {"link": link, "exception": None}


def _urls(value: Any) -> Iterator[str]:
    """Where the files of an answer are."""
    if isinstance(value, list):
        for each in value:
            yield from _urls(each)
    elif isinstance(value, dict):
        url = value.get("url")
        if isinstance(url, str) and not url.startswith("data:"):
            yield url
        for each in value.values():
            yield from _urls(each)


def _item(record: Record, *, expands: bool) -> dict[str, Any]:
    job, result = record.job, record.result
    item: dict[str, Any] = {
        "request_id": job.request_id,
        "endpoint_id": job.endpoint_id,
        "status": answers.STATUS[record.state],
        "sent_at": _iso(record.accepted_at),
        "started_at": _iso(record.started_at),
        "ended_at": _iso(record.finished_at),
        "duration": result.inference_s if result is not None else None,  # seconds
        "status_code": result.status if result is not None else None,
        "error": result.error if result is not None else None,
        "error_type": result.error_type if result is not None else None,
        "tags": list(job.tags),
    }
    if expands:
        item |= {"json_input": job.input, "json_output": result.body if result is not None else None}
    return item


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat()


def _number(text: str, name: str, least: int, most: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19 or not least <= int(text) <= most:
        raise BadRequest(f"{name} must be a whole number from {least} to {most}.")
    return int(text)
