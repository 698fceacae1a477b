"""The values of access: who may call, how much, and what is written down of it. All frozen."""

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum

from schemas.jobs import Priority


def digest(secret: str) -> str:
    """How a secret is kept: a plain SHA-256.

    Slow hashes and salts are for passwords, which can be guessed. A secret of ours is 256 random bits:
    nobody tries them all, and a hash per call must be cheap.
    """
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key may ask for; None: as much as it likes."""

    max_priority: Priority = Priority.NORMAL  # a request that asks for a higher one gets this
    per_minute: int | None = None  # requests accepted; after a pause so many at once
    max_queued: int | None = None  # requests of its tenant that wait
    max_running: int | None = None  # requests of its tenant at once: queued ones wait, no more runs are taken
    daily_requests: int | None = None  # requests accepted in a day, UTC

    @property
    def counts(self) -> bool:
        """Whether a submit has to be counted."""
        counted = (self.per_minute, self.max_queued, self.max_running, self.daily_requests)
        return any(each is not None for each in counted)


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept; its secret is known to its holder alone."""

    key_id: str
    tenant: str
    digest: str = field(repr=False)
    label: str = ""
    allowance: Allowance = Allowance()
    created_at: float = 0.0  # seconds since the epoch
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something: a tenant, by which key, from where."""

    tenant: str = "public"
    key_id: str | None = None  # None: the operator, the server itself, or anyone while no key is needed
    address: str | None = None  # of the client's network
    allowance: Allowance = Allowance()


class Action(StrEnum):
    """What is written down when it was done."""

    SUBMIT = "submit"
    CANCEL = "cancel"
    ERASE = "erase"
    REDELIVER = "redeliver"
    CREATE_KEY = "key.create"
    REVOKE_KEY = "key.revoke"
    ROTATE_KEY = "webhook_key.rotate"


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the audit; `seq` grows."""

    seq: int
    at: float  # seconds since the epoch
    action: Action
    tenant: str
    key_id: str | None
    address: str | None
    subject: str  # the id of the request or of the key
