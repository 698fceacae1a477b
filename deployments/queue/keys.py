"""The table of keys: what `darkroom keys` writes and every gateway process reads."""

import re
import secrets
import time
from collections.abc import Callable
from uuid import uuid4

from sqlalchemy import Connection, RowMapping, bindparam, func, insert, select, update

from deployments.queue import audit
from deployments.queue.database import Database
from deployments.queue.tables import keys
from schemas.access import Action, Actor, Allowance, Key, digest
from schemas.jobs import Priority

SECRET_BYTES = 32
MAX_LABEL = 200
_TENANT = re.compile(r"[A-Za-z0-9_.@-]{1,100}", re.ASCII)

ALL = select(keys).order_by(keys.c.created_at, keys.c.key_id)
FIND = select(keys).where(keys.c.key_id == bindparam("wanted")).with_for_update()
ADD = insert(keys)
REVOKE = update(keys).where(keys.c.key_id == bindparam("of")).values(revoked_at=bindparam("now"))

# Rows are only added, and revoked once: these two numbers differ whenever the table does.
VERSION = select(func.count(), func.count(keys.c.revoked_at)).select_from(keys)

Version = tuple[int, int]


class KeyTable:
    """Keys in any database. `clock` gives seconds since the epoch."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def close(self) -> None:
        await self._database.close()

    async def create(
        self, tenant: str | None = None, label: str = "", allowance: Allowance | None = None
    ) -> tuple[Key, str]:
        """A new key and its secret, which is kept nowhere. Without a tenant it is one of its own.

        Raises ValueError for a tenant or a label that cannot be.
        """
        key_id, secret = str(uuid4()), secrets.token_hex(SECRET_BYTES)
        tenant = key_id if tenant is None else tenant
        if not _TENANT.fullmatch(tenant):
            raise ValueError(f"a tenant is 1 to 100 letters, digits and . _ @ -, not {tenant[:120]!r}")
        if len(label) > MAX_LABEL or (label and not label.isprintable()):
            raise ValueError(f"a label is at most {MAX_LABEL} printable characters")
        now = self._clock()
        key = Key(key_id, tenant, digest(secret), label, allowance or Allowance(), now)

        def operation(connection: Connection) -> None:
            connection.execute(ADD, _values(key))
            audit.note(connection, Action.CREATE_KEY, Actor(tenant), key_id, now)

        await self._database.write(operation)
        return key, secret

    async def revoke(self, key_id: str) -> Key | None:
        """Make a key worthless for ever. Returns what it was before, None for one that does not exist."""
        now = self._clock()

        def operation(connection: Connection) -> Key | None:
            row = connection.execute(FIND, {"wanted": key_id}).mappings().first()
            if row is None:
                return None
            key = _key(row)
            if key.revoked_at is None:
                connection.execute(REVOKE, {"of": key_id, "now": now})
                audit.note(connection, Action.REVOKE_KEY, Actor(key.tenant), key_id, now)
            return key

        return await self._database.write(operation)

    async def all(self) -> list[Key]:
        """Every key, the revoked ones too, in the order of their creation."""
        return await self._database.read(lambda connection: _all(connection))

    async def since(self, known: Version | None) -> tuple[Version, list[Key]] | None:
        """The table's version and every key; None while the version is still the one that is known."""

        def operation(connection: Connection) -> tuple[Version, list[Key]] | None:
            total, revoked = connection.execute(VERSION).one()
            return None if known == (total, revoked) else ((total, revoked), _all(connection))

        return await self._database.read(operation)


def _all(connection: Connection) -> list[Key]:
    return [_key(row) for row in connection.execute(ALL).mappings()]


def _values(key: Key) -> dict[str, object]:
    """The columns that a new key fills."""
    may = key.allowance
    return {
        "key_id": key.key_id,
        "tenant": key.tenant,
        "digest": key.digest,
        "label": key.label,
        "created_at": key.created_at,
        "max_priority": int(may.max_priority),
        "per_minute": may.per_minute,
        "max_queued": may.max_queued,
        "max_running": may.max_running,
        "daily_requests": may.daily_requests,
        "used": 0,
    }


def _key(row: RowMapping) -> Key:
    may = Allowance(
        max_priority=Priority(row["max_priority"]),
        per_minute=row["per_minute"],
        max_queued=row["max_queued"],
        max_running=row["max_running"],
        daily_requests=row["daily_requests"],
    )
    return Key(
        row["key_id"], row["tenant"], row["digest"], row["label"], may, row["created_at"], row["revoked_at"]
    )
