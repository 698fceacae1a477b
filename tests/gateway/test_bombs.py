"""JSON that breaks parsers, at every path that takes a POST."""

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from deployments.gateway import http
from deployments.gateway.keys import Keys, parse
from pipelines.registry import ENDPOINTS
from tests.gateway.conftest import ALICE
from tests.support.gateway import Place
from tests.support.jobs import ENDPOINT

CPU_S = 10.0  # under 0.1 on a core of its own


def bodies() -> list[bytes]:
    deep = 100_000
    fixed = [
        b"[" * deep + b"]" * deep,
        b"[" * deep,
        b'{"a":' * deep + b"1" + b"}" * deep,
        b'{"prompt":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"prompt": "x", "seed": ' + b"9" * 5_000 + b"}",
        b'{"prompt": "x", "seed": -' + b"9" * 500_000 + b"}",
        b'{"prompt": "x", "seed": 1e999}',
        b'{"prompt": "x", "seed": -1e999}',
        b'{"prompt": "x", "seed": NaN}',
        b'{"prompt": "x", "seed": Infinity}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xc0\xaf"}',  # overlong
        b'{"prompt": "\xed\xa0\x80"}',  # a surrogate
        b'{"prompt": "\xf4\x90\x80\x80"}',  # beyond Unicode
        b'{"prompt": "a\\u0000b"}',
        b'{"prompt": "a\\ud800b"}',
        b'{"\\udfff": 1}',
        b'{"a\\u0000": 1}',
        b'{"prompt": "a\nb"}',  # a control as it is
        b"\xef\xbb\xbf{}",  # a byte order mark
        '{"prompt": "x"}'.encode("utf-16"),
        '{"prompt": "x"}'.encode("utf-32"),
        b'{"prompt": "x"',
        b'{"prompt": "x"}}',
        b'{"prompt": "x"}{}',
        b'{"prompt": "x",}',
        b"{'prompt': 'x'}",
        b'{"prompt": undefined}',
        b'{"prompt": 0x10}',
        b'{"prompt": 01}',
        b'{"prompt": .5}',
        b'{"prompt": "\\x41"}',
        b'{"prompt": "\\u00"}',
        b"// a comment\n{}",
        b"[]",
        b"[{}]",
        b'"prompt"',
        b"7",
        b"null",
        b"true",
        b"\x00",
        b"\x1f\x8b\x08\x00",  # gzip
        b"<?xml version='1.0'?><!DOCTYPE l [<!ENTITY a 'b'>]><l>&a;</l>",
        b"prompt=x&seed=1",
        b'{"__proto__": {"x": 1}, "parts": 3, "prompt": 1, "content_type": 4, "app": 5, "model": 6}',
        json.dumps({f"k{n}": n for n in range(20_000)} | {"prompt": 1, "parts": 1, "app": 1}).encode(),
        json.dumps({"prompt": ["x"] * 20_000, "parts": [1] * 20_000, "content_type": [], "app": {}}).encode(),
        b'{"prompt": 1, "prompt": 2, "parts": 1, "parts": 2, "content_type": 1, "app": 1}',  # twice
        b'{"loras": ' + json.dumps([{}] * 5_000).encode() + b"}",
    ]
    return fixed + list(_mutants(100))


def _mutants(count: int) -> Iterator[bytes]:
    """A good body with a few bytes changed, cut or said again, as long as it is no JSON any more."""
    chance = random.Random(33)
    good = json.dumps(
        {"prompt": "a \U0001f431", "seed": 7, "image_size": {"width": 64}, "loras": []}
    ).encode()
    while count:
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        if not _is_json(bytes(data)):
            count -= 1
            yield bytes(data)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _is_taken(path: str, body: bytes) -> bool:
    """Where nothing is asked for, or only little: an object of fields that mean nothing there is taken."""
    return path == "/rest/storage/auth/token" or body.startswith((b'{"k0', b'{"loras'))


BODIES = bodies()


def posts(place: Place) -> list[str]:
    """Every path of the application that takes a POST, and each endpoint's own."""
    app: Any = http.build(place.gateway, Keys(parse(ALICE)), _never, dict)
    while not hasattr(app, "routes"):
        app = app._app
    routes = [route for route in app.routes if isinstance(route, Route) and "POST" in (route.methods or ())]
    # What cannot be reached without a ticket is refused before a body is looked at; its JSON is below.
    paths = [route.path.replace("{path:path}", ENDPOINT) for route in routes]
    filled = [
        path.replace("{key}", "0" * 32).replace("{ticket}", "t").replace("{number}", "1") for path in paths
    ]
    own = [f"/queue/{endpoint}" for endpoint in ENDPOINTS]
    return list(dict.fromkeys([*filled, *own, f"/run/{ENDPOINT}/stream", "/api/fal/proxy"]))


async def _never() -> bool:
    return False


async def test_t33_no_body_is_a_fault_of_ours_at_any_path(place: Place, alice: httpx.AsyncClient) -> None:
    paths = posts(place)
    assert len(paths) >= 15 and "/v1/images/generations" in paths and "/rest/tokens/" in " ".join(paths) + "/"
    assert len(BODIES) >= 140
    takes_files = ("/files/upload", "/cdn/files/upload")  # a body there is a file, whatever is in it
    for path in paths:
        for body in BODIES:
            headers = {
                "content-type": "application/json",
                "x-fal-target-url": f"https://queue.fal.run/{ENDPOINT}",
            }
            if path.startswith(takes_files):
                headers["content-type"] = "no type"
            began = time.process_time()
            answer = await alice.post(path, content=body, headers=headers)
            spent = time.process_time() - began
            assert answer.status_code < 500, (path, body[:80], answer.text[:300])
            if not (path.startswith("/rest/") and _is_taken(path, body)):
                assert 400 <= answer.status_code, (path, body[:80], answer.text[:300])
            assert spent < CPU_S, (path, body[:80], spent)
            assert len(answer.content) < 20_000
    assert place.model.order == []


async def test_t33_the_list_of_parts_is_read_as_strictly(alice: httpx.AsyncClient) -> None:
    begun = (await alice.post("/rest/storage/upload/initiate-multipart", json={})).json()["upload_url"]
    url = httpx.URL(begun)
    for body in BODIES:
        answer = await alice.post(url.copy_with(path=f"{url.path}/complete"), content=body)
        assert answer.status_code in (400, 413, 422), (body[:80], answer.text[:300])


@pytest.mark.parametrize("depth", [31, 32, 33, 34, 100])
async def test_t33_the_bound_of_depth_is_where_it_is_said(depth: int, alice: httpx.AsyncClient) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    answer = await alice.post(f"/queue/{ENDPOINT}", json={"prompt": "x", "unknown": value})
    assert answer.status_code == (200 if depth <= 31 else 422)
