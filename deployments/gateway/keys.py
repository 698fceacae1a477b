"""API keys: who calls. And tokens, which a key's holder gives to a browser: for some apps, for a while."""

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable, Mapping

from pydantic import BaseModel, ConfigDict

from deployments.files.signatures import Signer
from schemas.errors import NotAuthenticated

ANYONE = "public"  # the tenant when authentication is off


def digest(secret: str) -> str:
    """How a secret is kept."""
    return hashlib.sha256(secret.encode()).hexdigest()


def parse(text: str) -> dict[str, str]:
    """`ID:SECRET` pairs, separated by commas or blanks → id → digest. Raises ValueError."""
    pairs = [pair.partition(":") for pair in text.replace(",", " ").split()]
    for key_id, _, secret in pairs:
        if not key_id or not secret:
            raise ValueError("a key must have the form ID:SECRET")
    return {key_id: digest(secret) for key_id, _, secret in pairs}


class Token(BaseModel):
    """What a token allows. An app is `owner/alias`, or an alias alone, or a whole endpoint id."""

    model_config = ConfigDict(frozen=True)

    apps: tuple[str, ...]
    until: float  # unix seconds

    def covers(self, path: str) -> bool:
        """Whether a path that begins with an endpoint id is below one of the apps."""
        alias = path.split("/")[1:2]
        return any([app] == alias or ("/" in app and f"{path}/".startswith(f"{app}/")) for app in self.apps)


class Keys:
    """The keys that open this server; none at all means that it is open.

    A token is signed with its holder's own digest: it ends with the key, and every process that knows the
    keys reads it.
    """

    def __init__(self, digests: Mapping[str, str], clock: Callable[[], float] = time.time) -> None:
        self._digests = dict(digests)
        self._clock = clock

    @property
    def are_required(self) -> bool:
        return bool(self._digests)

    def tenant(self, authorization: Iterable[str]) -> str:
        """The caller's tenant by its Authorization headers. Raises NotAuthenticated.

        The schemes Key and Bearer mean the same, in any case.
        """
        if not self.are_required:
            return ANYONE
        given = list(authorization)
        if not given:
            raise NotAuthenticated("Authentication is required to access this application.")
        scheme, _, credentials = given[0].strip().partition(" ")
        key_id, _, secret = credentials.strip().partition(":")
        known = self._digests.get(key_id, digest(""))
        matches = hmac.compare_digest(known, digest(secret))
        if len(given) == 1 and scheme.lower() in ("key", "bearer") and secret and matches:
            return key_id
        raise NotAuthenticated("invalid key credentials")

    def issue(self, tenant: str, apps: Iterable[str], seconds: float) -> str:
        """A token of the tenant's."""
        token = Token(apps=tuple(apps), until=self._clock() + seconds)
        return f"{tenant}:{self._signer(tenant).write(token)}"

    def holder(self, text: str, path: str) -> str:
        """The tenant of a token that covers the path. Raises NotAuthenticated."""
        if not self.are_required:
            return ANYONE
        tenant, _, word = text.partition(":")
        try:
            token = self._signer(tenant).read(Token, word)
        except ValueError:
            raise NotAuthenticated("The token was not given by this server.") from None
        if tenant not in self._digests or not token.covers(path):
            raise NotAuthenticated("The token is not for this application.")
        if token.until <= self._clock():
            raise NotAuthenticated("The token has expired.")
        return tenant

    def _signer(self, tenant: str) -> Signer:
        return Signer(self._digests.get(tenant, digest("")).encode())
