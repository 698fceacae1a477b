"""API keys: who calls."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping

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


class Keys:
    """The keys that open this server; none at all means that it is open."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = dict(digests)

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
