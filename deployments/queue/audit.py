"""The audit: who did what, in the transaction that did it, if one did. A row is added, and never changed."""

import time

from sqlalchemy import Connection, bindparam, insert, select

from deployments.queue.database import Database
from deployments.queue.tables import audit
from schemas.access import Action, Actor, Entry

ADD = insert(audit)
NEWEST = select(audit).order_by(audit.c.seq.desc()).limit(bindparam("limit"))
NEWEST_OF = NEWEST.where(audit.c.tenant == bindparam("wanted"))


def note(connection: Connection, action: Action, by: Actor, subject: str, now: float) -> None:
    """Write down that something was done to the request or the key `subject`."""
    connection.execute(
        ADD,
        {
            "at": now,
            "action": action,
            "tenant": by.tenant,
            "key_id": by.key_id,
            "address": by.address,
            "subject": subject,
        },
    )


class Audit:
    """What was done, for the operator."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def close(self) -> None:
        await self._database.close()

    async def add(self, action: Action, by: Actor, subject: str) -> None:
        """Write down what was done outside of the database."""
        now = time.time()
        await self._database.write(lambda connection: note(connection, action, by, subject, now))

    async def newest(self, limit: int, tenant: str | None = None) -> list[Entry]:
        """What was done last, the newest first; by one tenant, or by all."""

        def operation(connection: Connection) -> list[Entry]:
            statement = NEWEST if tenant is None else NEWEST_OF
            wanted = {"limit": limit} | ({} if tenant is None else {"wanted": tenant})
            found = connection.execute(statement, wanted).mappings()
            return [Entry(**{**row, "action": Action(row["action"])}) for row in found]

        return await self._database.read(operation)
