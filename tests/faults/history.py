"""What clients, dispatchers, models and receivers saw, one line each, in a file that survives any of them.

Every event has `kind`, `at` (when it was known) and, of what takes time, `asked` (when it began): seconds
of the machine's monotonic clock, the same in all processes. The kinds and their other facts:

    limits       max_attempts, max_crashes
    submit       id, tenant, model, priority, key, print, webhook, deadline, forgettable
    accepted     of (the id that was submitted), id (the one answered), key, tenant
    refused      of, is_unknown (whether it may have happened all the same)
    seen         id, tenant, state, error_type, digest
    peeked       id, tenant, found (whether a tenant that is not its own saw it)
    cancelling   id; then cancelled: id, outcome
    erasing, redelivered: id
    claimed      id, fence, attempt
    began        id, nonce, clock
    committing   id, fence; then committed: id, fence, held, digest
    killed       what
    posted       id, genuine, digest, answered
    file         name, is_right
    final        the request's row when all is over, and its webhook's
    left         what, count: of leases, slots and files that are still held in the end
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def digest(body: Any) -> str:
    """What stands for a JSON body."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


class History:
    """Several processes may write at once; a line that was written is not lost with its process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def write(self, kind: str, **facts: Any) -> None:
        event = {"kind": kind, "at": time.monotonic(), **facts}
        os.write(self._file, json.dumps(event).encode() + b"\n")

    def read(self) -> list[Event]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def close(self) -> None:
        os.close(self._file)
