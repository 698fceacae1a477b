"""What browsers are told of files and answers: nothing of a stranger runs, no page acts for somebody else."""

import httpx
import pytest

from tests.support.gateway import Place
from tests.support.jobs import ENDPOINT

PAGE = b"<!doctype html><script>alert(document.domain)</script>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
PNG = b"\x89PNG\r\n\x1a\n"
# name, type as its sender says, content, whether a browser may show it in place
CONTENTS = [
    ("a.html", "text/html", PAGE, False),
    ("a.xhtml", "application/xhtml+xml", PAGE, False),
    ("a.svg", "image/svg+xml", SVG, False),
    ("a.svg", "IMAGE/SVG+XML; charset=utf-8", SVG, False),
    ("a.svgz", "image/svg", SVG, False),
    ("a.xml", "text/xml", b"<?xml version='1.0'?><?xml-stylesheet href='data:,'?>" + SVG, False),
    ("a.pdf", "application/pdf", b"%PDF-1.7 /OpenAction /JavaScript", False),
    ("a.js", "text/javascript", b"alert(1)", False),
    ("a.mhtml", "multipart/related", b"MIME-Version: 1.0\r\n\r\n" + PAGE, False),
    ("a.swf", "application/x-shockwave-flash", b"CWS\x0a", False),
    ("a.wasm", "application/wasm", b"\0asm", False),
    ("a.css", "text/css", b"body{background:url(javascript:alert(1))}", False),
    ("a.zip", "application/zip", b"PK\x03\x04", False),
    ("a.json", "application/json", b'{"html": "<script>"}', False),
    ("a", "application/octet-stream", PAGE, False),
    ("a.png", "image/png", PNG + b"tEXt" + PAGE, True),  # polyglots: pictures by their type alone
    ("a.html", "image/png", PAGE, True),
    ("a.gif", "image/gif", b"GIF89a/*" + b"\0" * 8 + b"*/=1;alert(1)", True),
    ("a.jpg", "image/jpeg", b"\xff\xd8\xff\xfe" + PAGE, True),
    ("a.txt", "text/plain", PAGE, True),
    ("a.webm", "video/webm", PAGE, True),
]


@pytest.mark.parametrize(("name", "kind", "content", "is_shown"), CONTENTS)
async def test_t26_a_file_never_runs_where_it_is_served(
    name: str,
    kind: str,
    content: bytes,
    is_shown: bool,
    alice: httpx.AsyncClient,
    stranger: httpx.AsyncClient,
) -> None:
    headers = {"content-type": kind, "x-fal-file-name": name}
    sent = await alice.post("/cdn/files/upload", content=content, headers=headers)
    assert sent.status_code == 200, sent.text
    for answer in (
        await stranger.get(sent.json()["access_url"]),
        await stranger.head(sent.json()["access_url"]),
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"] == kind
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
        disposition = answer.headers["content-disposition"]
        assert disposition.partition(";")[0] == ("inline" if is_shown else "attachment")
        assert "set-cookie" not in answer.headers
    part = await stranger.get(sent.json()["access_url"], headers={"range": "bytes=0-3"})
    assert part.status_code == 206
    assert (
        part.headers["x-content-type-options"] == "nosniff"
        and "sandbox" in part.headers["content-security-policy"]
    )


async def test_t26_no_answer_is_a_page(alice: httpx.AsyncClient) -> None:
    """Whatever a caller's words are in it: JSON, by its type, and not to be taken for anything else. The
    pages of the playground have no caller's words in them."""
    for path in (
        "/",
        "/<script>",
        f"/queue/{ENDPOINT}/requests/<script>",
        "/files/<script>",
        "/openapi/<script>",
    ):
        answer = await alice.get(path)
        assert answer.headers["content-type"].startswith("application/json")


ATTACKS = [
    (
        "POST",
        f"/run/{ENDPOINT}",
        "text/plain",
        b'{"prompt": "x"}',
    ),  # what a form can send without being asked
    ("POST", f"/queue/{ENDPOINT}", "application/x-www-form-urlencoded", b'{"prompt": "x"}'),
    ("POST", f"/queue/{ENDPOINT}", "multipart/form-data; boundary=b", b'{"prompt": "x"}'),
    ("GET", f"/queue/{ENDPOINT}?prompt=x", "text/plain", b""),
    ("POST", "/rest/storage/upload/initiate", "text/plain", b"{}"),
    ("POST", "/rest/tokens/", "text/plain", b'{"allowed_apps": ["flux"]}'),
    ("DELETE", "/v1/models/requests/x/payloads", "text/plain", b""),
    ("PUT", f"/queue/{ENDPOINT}/requests/x/cancel", "text/plain", b""),
    ("POST", "/api/fal/proxy", "text/plain", b"{}"),
    ("POST", "/v1/images/generations", "text/plain", b'{"prompt": "x"}'),
]


@pytest.mark.parametrize(("method", "path", "kind", "body"), ATTACKS)
async def test_t27_a_strange_page_is_nobody(
    method: str, path: str, kind: str, body: bytes, place: Place, stranger: httpx.AsyncClient
) -> None:
    """All a browser sends of itself are cookies and the like, and none of it counts."""
    ambient = {"cookie": "fal_key=alice:s3cret; authorization=Key alice:s3cret", "content-type": kind}
    for more in (
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
        {"origin": "null"},
        {"host": "evil.example", "origin": "http://evil.example"},  # a name that leads to this address now
        {"host": "127.0.0.1:8265"},
    ):
        answer = await stranger.request(method, path, content=body, headers={**ambient, **more})
        assert answer.status_code == 401, answer.text
        assert "set-cookie" not in answer.headers
        assert "access-control-allow-credentials" not in answer.headers
    assert place.model.order == []


async def test_t27_no_answer_sets_a_cookie_or_trusts_one(alice: httpx.AsyncClient) -> None:
    for method, path in (("GET", "/"), ("POST", "/rest/storage/auth/token"), ("POST", f"/run/{ENDPOINT}")):
        answer = await alice.request(method, path, json={"prompt": "x"} if method == "POST" else None)
        assert "set-cookie" not in answer.headers
        assert answer.headers["access-control-allow-origin"] == "*"  # with which browsers send no credentials


async def test_t32_a_server_without_room_says_so(place: Place, alice: httpx.AsyncClient) -> None:
    settings = place.gateway.settings
    place.gateway.settings = settings.model_copy(update={"min_free_bytes": 2**60})
    refused = await alice.post(f"/queue/{ENDPOINT}", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error_type"]) == (507, "insufficient_storage")
    assert "no room" in refused.json()["message"]
    assert place.model.order == []
    place.gateway.settings = settings
    assert (await alice.post(f"/queue/{ENDPOINT}", json={"prompt": "x"})).status_code == 200


async def test_t04_a_result_is_found_by_its_whole_name_only(place: Place, alice: httpx.AsyncClient) -> None:
    """128 random bits; no part of them, no folder and no neighbour leads there."""
    names = set()
    for _ in range(20):
        key = await place.files.save(b"x", "image/png")
        names.add(key)
        random, _, extension = key.partition(".")
        assert len(random) == 32 and int(random, 16) >= 0 and extension == "png"
        assert (await alice.get(f"/files/{key}")).content == b"x"
        flipped = f"{int(random, 16) ^ 1:032x}.png"
        others = (flipped, random, random[:16], f"{random}.jpg", f"{random}*", "", "*")
        for other in others:
            assert (await alice.get(f"/files/{other}")).status_code in (400, 404), other
    assert len({name[:8] for name in names}) == len(names)
