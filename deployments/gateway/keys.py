"""API keys: who calls. And tokens, which a key's holder gives to a browser: for some apps, for a while."""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from deployments import logs
from deployments.files.signatures import Signer
from deployments.gateway.throttle import Throttle
from deployments.queue import KeyTable
from schemas.access import Actor, Key, digest
from schemas.errors import NotAuthenticated, StoreDown

logger = logging.getLogger(__name__)

ANYONE = "public"  # the tenant when authentication is off
LOOK_S = 1.0  # how old what is known of the table may be
MAX_CREDENTIALS = 1000  # characters
BAD_KEYS = 60  # of an address in a minute

_NOBODY = digest("")


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
    """The keys that open this server: those of the environment, each a tenant, and those of a table.

    None at all means that it is open. A revoked key counts: who had keys once is not open again.

    A token is signed with its key's digest, so it ends with the key, and with the server's own `secret`, so
    the table alone makes none. Every process that knows both reads it. `clock` gives seconds since the epoch,
    `ticks` seconds that only grow.
    """

    def __init__(
        self,
        digests: Mapping[str, str],
        clock: Callable[[], float] = time.time,
        table: KeyTable | None = None,
        throttle: Throttle | None = None,
        ticks: Callable[[], float] = time.monotonic,
        secret: bytes = b"",
    ) -> None:
        self._fixed = {key_id: Key(key_id, key_id, known) for key_id, known in digests.items()}
        self._live = self._fixed
        self._are_required = bool(self._fixed)
        self._clock = clock
        self._table = table
        self._throttle = throttle or Throttle(BAD_KEYS)
        self._version: tuple[int, int] | None = None
        self._looking = asyncio.Lock()
        self._ticks = ticks
        self._looked_at = float("-inf")
        self._secret = secret

    @property
    def are_required(self) -> bool:
        """Whether a call needs a key, as far as `refresh` has seen."""
        return self._are_required

    async def refresh(self) -> None:
        """Know what the table said at most `LOOK_S` ago. However many call, it is read once in that time.

        While it cannot be read, what it said last holds. Raises StoreDown if it has never been read.
        """
        if self._table is None or self._ticks() - self._looked_at < LOOK_S:
            return
        async with self._looking:
            began = self._ticks()
            if began - self._looked_at < LOOK_S:
                return
            try:
                news = await self._table.since(self._version)
            except StoreDown as error:
                if self._version is None:
                    raise
                logger.error("the keys could not be read; those known before hold: %s", logs.why(error))
                news = None
            self._looked_at = began
        if news is not None:
            self._version, found = news
            live = {key.key_id: key for key in found if key.revoked_at is None}
            self._live = live | self._fixed
            self._are_required = bool(self._fixed or found)

    async def actor(
        self, given: Sequence[str], address: str | None = None, token: str | None = None, path: str = ""
    ) -> Actor:
        """Who calls, by the Authorization headers; or where there are none, by a token that covers the path.

        The schemes Key and Bearer mean the same, in any case. Raises NotAuthenticated; TooManyRequests for a
        wrong key of an address that has shown too many.
        """
        await self.refresh()
        if not self._are_required:
            return Actor(ANYONE, None, address)
        if given:
            key = self._shown(given, address)
        elif token:
            key = self._signed_for(token, path)
        else:
            raise NotAuthenticated("Authentication is required to access this application.")
        return Actor(key.tenant, key.key_id, address, key.allowance)

    async def check(self, actor: Actor) -> None:
        """Raise NotAuthenticated if what opened the server to `actor` no longer does."""
        await self.refresh()
        if self._are_required and actor.key_id not in self._live:
            raise NotAuthenticated("The key has been revoked.")

    def _shown(self, given: Sequence[str], address: str | None) -> Key:
        """The key that one header shows, compared in constant time whether its id is known or not.

        Raises NotAuthenticated, and for a guess too many TooManyRequests. What has not the form of a key is
        a mistake and no guess.
        """
        scheme, _, credentials = given[0].strip().partition(" ")
        key_id, _, secret = credentials.strip()[:MAX_CREDENTIALS].partition(":")
        key = self._live.get(key_id)
        matches = hmac.compare_digest(_NOBODY if key is None else key.digest, digest(secret))
        is_said = len(given) == 1 and scheme.lower() in ("key", "bearer") and secret != ""
        if key is not None and is_said and matches:
            return key
        if is_said:
            self._throttle.failed(address)
        raise NotAuthenticated("invalid key credentials")

    # --- tokens ---

    def issue(self, key_id: str, apps: Iterable[str], seconds: float) -> str:
        """A token that stands for a key."""
        token = Token(apps=tuple(apps), until=self._clock() + seconds)
        return f"{key_id}:{self._signer(key_id).write(token)}"

    def _signed_for(self, text: str, path: str) -> Key:
        """The key behind a token that covers the path. Raises NotAuthenticated."""
        key_id, _, word = text.partition(":")
        try:
            token = self._signer(key_id).read(Token, word)
        except ValueError:
            raise NotAuthenticated("The token was not given by this server.") from None
        key = self._live.get(key_id)
        if key is None or not token.covers(path):
            raise NotAuthenticated("The token is not for this application.")
        if token.until <= self._clock():
            raise NotAuthenticated("The token has expired.")
        return key

    def _signer(self, key_id: str) -> Signer:
        key = self._live.get(key_id)
        return Signer(self._secret + (_NOBODY if key is None else key.digest).encode())
