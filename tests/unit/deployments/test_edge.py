"""What Serve is told of a request: uploads ask it not to read ahead, and callers tell it nothing."""

import pytest
from starlette.types import Message, Receive, Scope, Send

from deployments.gateway.edge import Edge, middlewares


@pytest.mark.parametrize(
    ("method", "path", "is_upload"),
    [
        ("PUT", "/files/0123_cat.png", True),
        ("PUT", "/files/0123_cat.png/multipart/ticket/7", True),
        ("POST", "/files/upload", True),
        ("POST", "/cdn/files/upload", True),
        ("GET", "/files/0123_cat.png", False),
        ("POST", "/run/fal-ai/flux/dev", False),  # who leaves it is noticed at once
        ("GET", "/queue/fal-ai/flux/requests/1/status/stream", False),
    ],
)
async def test_only_uploads_are_not_read_ahead(method: str, path: str, is_upload: bool) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    headers = [(b"host", b"box")]
    given = [*headers, (b"X-Request-Timeout-Seconds", b"0.001"), (b"x-request-disconnect-disabled", b"?1")]
    await Edge(app)({"type": "http", "method": method, "path": path, "headers": given}, receive, send)
    added = [(b"x-request-disconnect-disabled", b"?1")] if is_upload else []
    assert seen[0]["headers"] == [*headers, *added]


def test_serve_knows_the_header_and_takes_the_list() -> None:
    http_util = pytest.importorskip("ray.serve._private.http_util")
    assert http_util.parse_disconnect_disabled_header({b"x-request-disconnect-disabled": b"?1"})
    assert http_util.parse_request_timeout_header({b"x-request-timeout-seconds": b"1"}, None) == 1
    assert http_util.validate_http_proxy_callback_return(middlewares())
