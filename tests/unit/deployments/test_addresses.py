"""Every way of addressing a service, and what a path names."""

import pytest

from deployments.gateway.addresses import Verb, belongs, canonical, queue_path
from schemas.errors import BadRequest, NotFound, TargetRefused

ID = "0f5c2a3b-1111-4222-8333-0123456789ab"


@pytest.mark.parametrize(
    ("path", "query", "headers", "expected"),
    [
        ("/run/fal-ai/flux/dev", "", {}, "/run/fal-ai/flux/dev"),
        ("/queue/fal-ai/flux/dev", "", {"host": "rest.fal.ai"}, "/queue/fal-ai/flux/dev"),  # prefix first
        ("/fal-ai/flux/dev", "", {"host": "fal.run"}, "/run/fal-ai/flux/dev"),
        ("/fal-ai/flux/dev", "", {"host": "queue.fal.run:443"}, "/queue/fal-ai/flux/dev"),
        ("/fal-ai/flux/dev", "", {"host": "QUEUE.my.box"}, "/queue/fal-ai/flux/dev"),
        ("/tokens/", "", {"host": "rest.alpha.fal.ai"}, "/rest/tokens/"),
        ("/files/upload", "", {"host": "v3.fal.media"}, "/files/upload"),
        ("/cdn/files/upload/multipart", "", {}, "/files/upload/multipart"),  # the CDN's files are ours
        ("/cdn/tokens", "", {}, "/cdn/tokens"),
        # what follows our URLs by their paths, below fal's hosts or a base of ours
        ("/queue/queue/fal-ai/flux/dev", "", {}, "/queue/fal-ai/flux/dev"),
        ("/run/queue/fal-ai/flux/dev", "", {}, "/queue/fal-ai/flux/dev"),
        ("/queue/cdn/files/upload", "", {}, "/files/upload"),
        ("/queue/queue/queue/fal-ai", "", {}, "/queue/queue/fal-ai"),  # but once
        ("//run/queue/fal-ai", "", {}, "//run/queue/fal-ai"),
        ("/fal-ai/flux/dev", "", {"host": "box"}, "/run/fal-ai/flux/dev"),
        ("/fal-ai/flux/dev", "fal_webhook=http%3A%2F%2Fx", {}, "/queue/fal-ai/flux/dev"),
        ("/fal-ai/flux/dev", "fal_max_queue_length=3", {}, "/queue/fal-ai/flux/dev"),
        ("/fal-ai/flux/dev", "", {"x-fal-queue-priority": "normal"}, "/queue/fal-ai/flux/dev"),
        (f"/fal-ai/flux/requests/{ID}/status", "", {}, f"/queue/fal-ai/flux/requests/{ID}/status"),
        ("/health", "", {}, "/health"),
        ("/", "", {}, "/"),
        ("/playground", "", {"host": "queue.my.box"}, "/playground"),
        ("/playground/fal-ai/flux/dev", "fal_webhook=x", {"host": "fal.run"}, "/playground/fal-ai/flux/dev"),
        ("/.well-known/jwks.json", "", {"host": "rest.fal.ai"}, "/rest/.well-known/jwks.json"),
        ("/.well-known/jwks.json", "fal_webhook=x", {"host": "box"}, "/rest/.well-known/jwks.json"),
        ("//evil", "", {}, "/run//evil"),
    ],
)
def test_an_address_gets_its_prefix(path: str, query: str, headers: dict[str, str], expected: str) -> None:
    assert canonical(path, query, headers).path == expected


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("https://queue.fal.run/fal-ai/flux/dev?fal_webhook=x", "/queue/fal-ai/flux/dev", "fal_webhook=x"),
        ("https://fal.run/fal-ai/flux/dev/stream", "/run/fal-ai/flux/dev/stream", ""),
        ("https://rest.fal.ai/tokens/", "/rest/tokens/", ""),
        ("https://rest.alpha.fal.ai/tokens/", "/rest/tokens/", ""),
        ("https://v3.fal.media/files/upload?x=1", "/files/upload", "x=1"),
        ("https://v3b.fal.media/files/upload", "/files/upload", ""),
        ("https://fal.media/files/upload", "/files/upload", ""),
        ("https://queue.fal.run/queue/fal-ai/flux/dev", "/queue/fal-ai/flux/dev", ""),
        ("http://box:8000/queue/fal-ai/flux/dev", "/queue/fal-ai/flux/dev", ""),  # our own address
    ],
)
def test_the_proxy_goes_where_the_target_says(target: str, path: str, query: str) -> None:
    headers = {"x-fal-target-url": target, "host": "box:8000"}
    address = canonical("/api/fal/proxy", "ignored=1", headers)
    assert (address.path, address.query) == (path, query)


@pytest.mark.parametrize(
    ("target", "refusal"),
    [
        (None, BadRequest),
        ("", BadRequest),
        ("file:///etc/passwd", BadRequest),
        ("http://[::1", BadRequest),
        ("https://evil.com#fal.run", TargetRefused),
        ("https://example.com/fal-ai/flux", TargetRefused),
        ("https://fal.run.evil.com/x", TargetRefused),
        ("https://fal.run@evil.com/x", TargetRefused),
        ("http://box:8000/health", TargetRefused),  # ours, but no service
        ("http://other:8000/queue/x", TargetRefused),
    ],
)
def test_the_proxy_serves_nothing_else(target: str | None, refusal: type[Exception]) -> None:
    headers = {"host": "box:8000"} | ({"x-fal-target-url": target} if target is not None else {})
    with pytest.raises(refusal):
        canonical("/api/fal/proxy", "", headers)


@pytest.mark.parametrize(
    ("path", "verb", "app"),
    [
        ("fal-ai/flux/dev", Verb.SUBMIT, "fal-ai/flux/dev"),
        (f"fal-ai/flux/requests/{ID}", Verb.RESULT, "fal-ai/flux"),
        (f"fal-ai/flux/requests/{ID}/", Verb.RESULT, "fal-ai/flux"),
        (f"fal-ai/flux/requests/{ID}/response", Verb.RESULT, "fal-ai/flux"),
        (f"fal-ai/flux/requests/{ID}/status/", Verb.STATUS, "fal-ai/flux"),
        (f"fal-ai/flux/requests/{ID}/status/stream", Verb.STATUS_STREAM, "fal-ai/flux"),
        (f"fal-ai/flux/dev/requests/{ID}/cancel", Verb.CANCEL, "fal-ai/flux/dev"),
        ("fal-ai/requests", Verb.SUBMIT, "fal-ai/requests"),  # an app may be called that
    ],
)
def test_a_queue_path_is_read(path: str, verb: Verb, app: str) -> None:
    read = queue_path(path)
    assert (read.verb, read.app) == (verb, app)


@pytest.mark.parametrize(
    "path",
    [
        "fal-ai/flux/requests",
        "fal-ai/flux/requests/",
        "fal-ai/flux/requests/../../etc/passwd",
        "fal-ai/flux/requests/not-an-id",
        f"fal-ai/flux/requests/{ID}/other",
        f"fal-ai/flux/requests/{ID}/status/stream/more",
        f"fal-ai/flux/requests/{ID.upper()}",
    ],
)
def test_other_paths_are_not_found(path: str) -> None:
    with pytest.raises(NotFound):
        queue_path(path)


def test_a_request_belongs_to_its_application_and_to_its_full_id_only() -> None:
    assert belongs("fal-ai/flux/dev", "fal-ai/flux")
    assert belongs("fal-ai/flux/dev", "fal-ai/flux/dev")
    assert not belongs("fal-ai/flux/dev", "fal-ai")
    assert not belongs("fal-ai/flux/dev", "fal-ai/flux-lora")
