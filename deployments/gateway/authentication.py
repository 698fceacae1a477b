"""Who calls: the layer that lets nobody through without a key."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway import pages, tokens
from deployments.gateway.addresses import BARE_JWKS, JWKS, canonical
from deployments.gateway.keys import Keys
from deployments.gateway.throttle import address_of
from schemas.access import Actor

# A file is named by 128 random bits. Who sends one shows a ticket or a pass instead of a key.
# What can be asked of a model is no secret, and fal shows it to anyone. The playground's pages say nothing of
# anyone: what they show, they ask for with the key of whoever looks.
PUBLIC_PREFIXES = ("/files/", "/cdn/files/", "/openapi/", "/api/openapi/", "/playground/")
PUBLIC_PATHS = ("/health", "/ready", "/v1/models", "/playground", JWKS, BARE_JWKS)

WEBSOCKETS = "/run/"  # whose route checks the key itself, because it has to take the connection first


class Authentication:
    """Denies what has no key, but for a literal list of public paths.

    `proxies` of the operator's stand in front, see `address_of`.
    """

    def __init__(self, app: ASGIApp, keys: Keys, proxies: int) -> None:
        self._app = app
        self._keys = keys
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["address"] = address_of(scope, self._proxies)
        if not self._is_public(scope):
            state["actor"] = actor = await self._actor(scope)
            state["tenant"] = actor.tenant
        await self._app(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        path: str = scope["path"]
        if scope["type"] == "websocket":
            query = scope["query_string"].decode("latin-1")
            return canonical(path, query, Headers(scope=scope)).path.startswith(WEBSOCKETS)
        return path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES) or pages.is_visit(scope)

    async def _actor(self, scope: Scope) -> Actor:
        """By the key, or by the token that a browser has instead of one."""
        headers, query = Headers(scope=scope), scope["query_string"].decode("latin-1")
        given, token, covered = headers.getlist("authorization"), tokens.token_in(query), ""
        if token and not given:
            covered = tokens.covered(canonical(scope["path"], query, headers).path)
        return await self._keys.actor(given, scope["state"]["address"], token, covered)
