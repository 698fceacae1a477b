"""Without a key nothing opens, however it is asked for, but for what this file lists."""

import hmac
from collections.abc import AsyncIterator, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from starlette.routing import Route, Router, WebSocketRoute

from deployments.gateway import http
from deployments.gateway.keys import Keys, parse
from deployments.gateway.throttle import Throttle
from schemas.errors import NotAuthenticated, TooManyRequests
from tests.gateway.conftest import ALICE
from tests.support.gateway import Place, gateway_at_work
from tests.support.jobs import ENDPOINT

# What anybody may ask for. Literal on purpose: what is new needs a key until somebody writes it here.
PUBLIC_PATHS = {
    "/health",
    "/ready",
    "/v1/models",
    "/playground",
    "/rest/.well-known/jwks.json",
    "/.well-known/jwks.json",
}
PUBLIC_PREFIXES = ("/files/", "/cdn/files/", "/openapi/", "/api/openapi/", "/playground/")
PUBLIC_ROUTES = {
    "/health",
    "/ready",
    "/v1/models",
    "/rest/.well-known/jwks.json",
    "/rest/{path:path}",  # another method at the JWKS: 404
    "/openapi/{endpoint_id:path}",
    "/api/openapi/queue/openapi.json",
    "/playground",  # pages without anybody's data
    "/playground/",
    "/playground/static/{name}",
    "/playground/{endpoint_id:path}",
    "/files/{key}",  # by a name of 128 random bits, or with a ticket
    "/files/{key}/complete",
    "/files/{key}/{number}",
    "/files/{key}/multipart/{ticket}/complete",
    "/files/{key}/multipart/{ticket}/{number}",
    "/files/upload",  # with a pass or a key: their handlers ask for it
    "/files/upload/multipart",
}

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "BREW")
UUID = "00000000-0000-4000-8000-000000000000"
TAILS = [
    ENDPOINT,
    *(f"fal-ai/flux/requests/{UUID}{each}" for each in ("", "/status", "/status/stream", "/cancel")),
]
FILLED = {
    "name": "form.js",
    "key": "a.png",
    "number": "1",
    "ticket": "x.y",
    "request_id": UUID,
    "endpoint_id:path": ENDPOINT,
}
OTHER_PATHS = (
    *(f"/{each}" for each in TAILS),
    "/api/fal/proxy",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/admin",
    "/-/routes",
    "/-/healthz",
    "/queue",
    "/run",
    "/files",
    "/v1",
    "/v1/",
)


def spelled(path: str) -> Iterator[str]:
    """Ways of writing a path, as they stand in a request line."""
    yield path
    yield f"{path}/"
    yield f"/{path}"
    yield path.replace("/", "//")
    yield "/" + path[1:].replace("/", "%2f")
    yield "/" + path[1:].replace("/", "%252f")
    yield path.upper()
    yield f"{path};x=1"
    yield f"/.{path}"
    yield f"/files/..{path}"
    yield f"/health/..{path}"
    yield f"/openapi/%2e%2e{path}"
    yield f"http://127.0.0.1{path}"
    yield f"/%{ord(path[1]):02x}{path[2:]}" if len(path) > 1 else "/%2f"
    yield f"{path}%00"
    yield f"{path}%20"
    yield path.replace("/", "\\")
    yield f"{path}?x=/health"


SPELLINGS = len(list(spelled("/a")))

Headers = list[tuple[bytes, bytes]]


def shown(revoked: str) -> dict[str, tuple[Headers, str]]:
    """What is shown that opens nothing: headers and a query."""
    good = ALICE.encode()

    def header(*values: bytes) -> tuple[Headers, str]:
        return [(b"authorization", each) for each in values], ""

    return {
        "none": ([], ""),
        "bad": header(b"Key alice:guess"),
        "revoked": header(b"Key " + revoked.encode()),
        "another scheme": header(b"Basic " + good),
        "spaces": header(b"Key " + b" " * 50),
        "two headers": header(b"Key " + good, b"Key " + good),
        "a megabyte": header(b"Key alice:" + b"a" * 2**20),
        "a key in the query": ([], f"key={ALICE}&authorization=Key%20{ALICE}&FAL_KEY={ALICE}"),
        "a key for a token": ([], f"fal_jwt_token={ALICE}"),
        "other headers": (
            [
                (b"x-api-key", good),
                (b"cookie", b"key=" + good),
                (b"x-forwarded-for", b"127.0.0.1"),
                (b"x-original-url", b"/health"),
            ],
            "",
        ),
        "a browser's": ([(b"accept", b"text/html,*/*;q=0.8"), (b"sec-fetch-mode", b"navigate")], ""),
    }


def router_in(app: Any) -> Router:
    while not isinstance(app, Router):
        app = app._app
    return app


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with gateway_at_work(tmp_path, keys=ALICE) as place:
        yield place


def built(place: Place, limit: int = 10**9) -> Any:
    """The place's application again, which looks at the table once a second, like a server's."""
    keys = Keys(parse(ALICE), table=place.table, throttle=Throttle(limit))

    async def ready() -> bool:
        return True

    return http.build(place.gateway, keys, ready, lambda: {"keys": []})


class Watched:
    """An application whose HTTP handlers only say that they were reached."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.reached: list[str] = []
        router = router_in(app)
        for route in router.routes:
            if isinstance(route, Route):
                route.app = self._handler(route.path)
        self.paths = list(dict.fromkeys(route.path for route in router.routes if isinstance(route, Route)))
        self.sockets = [route.path for route in router.routes if isinstance(route, WebSocketRoute)]

    def _handler(self, path: str) -> Any:
        async def handler(scope: Any, receive: Any, send: Any) -> None:
            self.reached.append(path)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        return handler

    async def call(self, kind: str, method: str, target: str, headers: Headers, query: str = "") -> list[Any]:
        """What the application sends to one call."""
        path, _, own_query = target.partition("?")
        scope = {
            "type": kind,
            "method": method,
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": "&".join(filter(None, (own_query, query))).encode(),
            "headers": [(b"host", b"127.0.0.1"), *headers],
            "client": ("192.0.2.1", 4711),
            "scheme": "http" if kind == "http" else "ws",
            "root_path": "",
            "http_version": "1.1",
            "subprotocols": [],
        }
        sent: list[Any] = []
        coming = iter([{"type": "websocket.connect"}] if kind == "websocket" else [])

        async def receive() -> Any:
            return next(coming, {"type": f"{kind}.disconnect", "code": 1000})

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        return sent


def filled(path: str) -> Iterator[str]:
    """Real paths for a route's."""
    for name, value in FILLED.items():
        path = path.replace(f"{{{name}}}", value)
    tails = TAILS if path.startswith("/queue/") else TAILS[:1]
    yield from dict.fromkeys(path.replace("{path:path}", tail) for tail in tails)


async def revoked_key(place: Place) -> str:
    key, secret = await place.table.create("alice")
    await place.table.revoke(key.key_id)
    return f"{key.key_id}:{secret}"


@pytest.mark.parametrize("name", shown(""))
async def test_t01_nothing_that_is_not_listed_opens_without_a_key(name: str, place: Place) -> None:
    app = Watched(built(place))
    paths = [*(path for each in app.paths for path in filled(each)), *OTHER_PATHS]
    assert len(paths) > 40 and SPELLINGS >= 12
    opened, wrong = set(), []
    refusals = {401, 400} if name == "a key for a token" else {401}  # 400: the proxy without a target
    headers, query = shown(await revoked_key(place))[name]
    for path in paths:
        for target, method in product(spelled(path), METHODS):
            app.reached.clear()
            [start, *_] = await app.call("http", method, target, headers, query)
            plain = unquote(target.partition("?")[0])
            is_public = plain in PUBLIC_PATHS or plain.startswith(PUBLIC_PREFIXES)
            if name == "a browser's" and plain == "/" and method in ("GET", "HEAD"):
                assert app.reached == ["/"]  # which sends it to the playground
            elif is_public:
                opened |= set(app.reached)
            elif app.reached or start["status"] not in refusals:
                wrong.append((method, target, start["status"], list(app.reached)))
    assert wrong == []
    assert opened <= PUBLIC_ROUTES


async def test_t01_a_good_key_reaches_what_the_walk_walked(place: Place) -> None:
    """Otherwise the walk would prove nothing."""
    app = Watched(built(place))
    for path in app.paths:
        for target in filled(path):
            for method in METHODS[:6]:
                await app.call("http", method, target, [(b"authorization", f"Key {ALICE}".encode())])
    assert set(app.reached) == set(app.paths)


async def test_t01_a_preflight_is_answered_by_no_handler(place: Place) -> None:
    app = Watched(built(place))
    for path in (*app.paths, *OTHER_PATHS):
        [start, body] = await app.call("http", "OPTIONS", path, [])
        assert (start["status"], body["body"], app.reached) == (200, b"{}", [])


async def test_t01_no_websocket_opens_without_a_key(place: Place) -> None:
    app = Watched(built(place))
    assert app.sockets == ["/run/{path:path}"]  # whose handler checks the key
    paths = [*(f"/run/{each}/realtime" for each in (ENDPOINT, "fal-ai/nope")), f"/{ENDPOINT}/realtime"]
    paths += ["/queue/x", "/health", "/files/x", "/openapi/x", "/", "/rest/x", "/v1/models"]
    for path, (headers, query) in product(paths, shown(await revoked_key(place)).values()):
        for target in spelled(path):
            [first, *others] = await app.call("websocket", "GET", target, headers, query)
            if first["type"] == "websocket.accept":
                [told, closed] = others
                assert '"Unauthorized"' in told["text"] and closed["code"] == 1008
            else:
                assert first["type"] == "websocket.close" and others == []
    assert place.model.order == [] and await place.queue.recent("alice", 9) == []


async def test_t01_the_other_kinds_of_scope_are_denied_but_for_lifespan(place: Place) -> None:
    """What ASGI may bring one day has no way in of its own."""
    layer = built(place)
    while type(layer).__name__ != "Authentication":
        layer = layer._app
    reached = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    layer._app = inner
    scope: dict[str, Any] = {"path": "/run/x", "query_string": b"", "headers": [], "client": None}
    await layer({**scope, "type": "lifespan"}, None, None)
    for other in ({"type": "webtransport"}, {"type": "websocket", "path": "/health"}):
        with pytest.raises(NotAuthenticated):
            await layer({**scope, **other}, None, None)
    assert reached == ["lifespan"]


# --- guessing ---


async def test_t02_ten_thousand_wrong_keys_open_nothing_and_are_throttled(place: Place) -> None:
    app = Watched(built(place, limit=30))
    good: Headers = [(b"authorization", f"Key {ALICE}".encode())]
    statuses = []
    for number in range(10_000):
        guess = f"Key alice:{number:064x}" if number % 2 else f"Key {quote(str(number))}:x"
        [start, *_] = await app.call("http", "GET", "/", [(b"authorization", guess.encode())])
        statuses.append(start["status"])
        if start["status"] == 429:
            assert 1 <= int(dict(start["headers"])[b"retry-after"]) <= 60
        if number % 1000 == 0:  # the same address, with the right one, is never locked out
            [start, *_] = await app.call("http", "GET", "/", good)
            assert start["status"] == 200
    assert statuses[:30] == [401] * 30 and set(statuses) == {401, 429}
    assert statuses.count(401) < 200  # a few more minutes may have begun
    assert app.reached == ["/"] * 10


async def test_t02_the_database_is_not_asked_about_each_wrong_key(place: Place) -> None:
    looks = []

    class Counted:
        async def since(self, known: Any) -> Any:
            looks.append(known)
            return await place.table.since(known)

    table: Any = Counted()
    keys = Keys(parse(ALICE), table=table, throttle=Throttle(5), ticks=lambda: 7.0)
    for number in range(1000):
        with pytest.raises((NotAuthenticated, TooManyRequests)):
            await keys.actor([f"Key alice:{number}"])
    assert len(looks) == 1


async def test_t02_secrets_are_compared_in_constant_time_whether_the_id_is_known_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []

    def compare(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = Keys(parse(ALICE))
    for header in (f"Key {ALICE}", "Key alice:guess", "Key nobody:guess", "Basic x"):
        try:
            await keys.actor([header])
        except NotAuthenticated:
            pass
    assert compared == [(64, 64)] * 4


async def test_t02_the_database_has_no_key(place: Place, tmp_path: Path) -> None:
    _, secret = await place.table.create("alice")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        data = path.read_bytes()
        assert secret.encode() not in data and bytes.fromhex(secret) not in data
