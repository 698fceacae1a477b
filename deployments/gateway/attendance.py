"""Who waits for which request.

A run is cancelled when its caller leaves, but not at once: fal's clients send a POST again, blindly, when a
connection breaks, and the same call within `linger_s` finds its request instead of making another. Nothing
else is joined: two callers who wait for the same thing at the same time wanted it twice.

This process remembers it. A call that comes again after a restart, or to another replica of the gateway,
is the same only under an Idempotency-Key.
"""

import asyncio
import contextvars
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from deployments.gateway.abandoned import abandon
from deployments.gateway.gateway import Accepted, Gateway, fingerprint


@dataclass(frozen=True, slots=True)
class _Missed:
    """What a call came to, whose answer nobody got, and when that is forgotten."""

    accepted: Accepted
    end: asyncio.TimerHandle


class Attendance:
    """One per process."""

    def __init__(self, gateway: Gateway, linger_s: float) -> None:
        self._gateway = gateway
        self._linger_s = linger_s
        self._waiting: Counter[str] = Counter()  # callers, by request id
        self._left: dict[str, _Missed] = {}  # by call

    def returning(self, call: str) -> Accepted | None:
        """What the same call was accepted as, if its caller has just left."""
        missed = self._left.pop(call, None)
        if missed is None:
            return None
        missed.end.cancel()
        return missed.accepted

    @contextmanager
    def visit(self, call: str, accepted: Accepted) -> Iterator["Visit"]:
        """A caller waits, until the end of the block or of the answer that takes the visit over."""
        self._waiting[accepted.job.request_id] += 1
        visit = Visit(self, self._gateway, call, accepted)
        try:
            yield visit
        finally:
            if not visit.goes_on:
                visit.end()

    def leave(self, call: str, accepted: Accepted, *, served: bool) -> None:
        """A caller waits no longer; `served` says whether it has its answer."""
        request_id = accepted.job.request_id
        self._waiting[request_id] -= 1
        if self._waiting[request_id] > 0:
            return
        del self._waiting[request_id]
        if not served:
            self.missed(call, accepted)

    def missed(self, call: str, accepted: Accepted, *, cancels: bool = True) -> None:
        """Nobody got the answer to a call. It may come again; if it does not, the request is cancelled."""

        def forget() -> None:
            if self._left.get(call) is missed:
                del self._left[call]
            is_awaited = accepted.job.request_id in self._waiting
            if cancels and not accepted.receipt.replayed and not is_awaited:
                abandon(self._gateway, accepted.job)

        loop = asyncio.get_running_loop()
        end = loop.call_later(self._linger_s, forget, context=contextvars.Context())
        missed = self._left[call] = _Missed(accepted, end)


class Visit:
    """A caller's wait for a result. It ends once."""

    def __init__(self, attendance: Attendance, gateway: Gateway, call: str, accepted: Accepted) -> None:
        job = accepted.job
        self.result = asyncio.ensure_future(gateway.result(job.request_id, job.tenant))
        self.is_served = False  # its caller has the answer
        self.goes_on = False  # beyond the block
        self._attendance = attendance
        self._call = call
        self._accepted = accepted

    def end(self) -> None:
        self.result.cancel()
        self._attendance.leave(self._call, self._accepted, served=self.is_served)


def call(verb: str, request: Request, endpoint_id: str, fields: Mapping[str, Any]) -> str:
    """The same for the same call of the same caller. A new Idempotency-Key makes it another."""
    key = request.headers.get("idempotency-key", "")
    return f"{verb} {request.state.tenant} {fingerprint(endpoint_id, fields)} {key}"
