"""What the queue promises, said once more without a database: plain values in plain containers.

It knows nothing of the queue's code. Times are seconds; each verb takes the time at which it happens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from schemas.deliveries import DeliveryState
from schemas.jobs import Job, JobResult, State

HOUR_S, DAY_S = 3600.0, 86_400.0
LEASE_S, WEBHOOK_LEASE_S = 30.0, 20.0
MAX_CRASHES, MAX_ATTEMPTS = 2, 4
BACKOFFS_S = {1: 4.0, 2: 8.0, 3: 16.0}  # after so many starts
KEEP_S = DAY_S / 2  # results
KEY_S = DAY_S  # what came under an Idempotency-Key
UNKEPT_S = HOUR_S  # payloads of who wants none kept

End = Literal["its result", "cancelled", "too late", "lost"]


@dataclass
class Request:
    """One request as it should be."""

    job: Job
    number: int  # of its acceptance
    round: int  # among the tenants of its model and priority
    accepted_at: float
    deadline: float | None
    state: State = State.QUEUED
    rests_until: float = 0.0
    fence: int = 0  # the highest that was seen
    attempts: int = 0
    crashes: int = 0
    owner: str = ""
    lease_until: float = 0.0
    cancel_asked: bool = False
    end: End | None = None
    wanted: JobResult | None = None  # of its worker
    seen: JobResult | None = None  # once it has ended, what it said then
    ended_at: float = 0.0
    is_erased: bool = False
    log: list[str] = field(default_factory=list)

    @property
    def place(self) -> tuple[int, int, int]:
        return self.job.priority, self.round, self.number

    def may_start(self, now: float) -> bool:
        waits = self.state == State.QUEUED and self.rests_until <= now
        return waits and (self.deadline is None or now < self.deadline)


@dataclass
class Webhook:
    """What is owed for a request."""

    state: DeliveryState
    due_at: float
    attempts: int = 0
    retries: int = 0
    lease_until: float = 0.0

    @property
    def is_owed(self) -> bool:
        return self.state in (DeliveryState.DUE, DeliveryState.SENDING)


class Book:
    """All requests, webhooks and keys."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.webhooks: dict[str, Webhook] = {}  # by request
        self.keys: dict[tuple[str, str], tuple[str, str, float]] = {}  # what was asked, the request, when
        self.accepted = 0

    # --- what there is ---

    def queued(self, model: str) -> list[Request]:
        """In the order in which they start."""
        found = [each for each in self._in(State.QUEUED) if each.job.model == model]
        return sorted(found, key=lambda each: each.place)

    def startable(self, model: str, now: float) -> list[Request]:
        return [each for each in self.queued(model) if each.may_start(now)]

    def running(self) -> list[Request]:
        return list(self._in(State.RUNNING))

    def of_tenant(self, tenant: str) -> list[Request]:
        """The newest first."""
        found = [each for each in self.requests.values() if each.job.tenant == tenant]
        return sorted(found, key=lambda each: -each.number)

    def position(self, request: Request) -> int:
        return self.queued(request.job.model).index(request)

    def held(self, request_id: str, fence: int) -> Request | None:
        """The request, if who claimed it with this fence still holds it."""
        request = self.requests.get(request_id)
        holds = request is not None and request.state == State.RUNNING and request.fence == fence
        return request if holds else None

    def known(self, tenant: str, key: str, now: float) -> tuple[str, Request] | None:
        """What was asked under a key, and the request that answers it still."""
        asked, request_id, at = self.keys.get((tenant, key), ("", "", 0.0))
        request = self.requests.get(request_id)
        if request is None or now - at > KEY_S:
            return None
        ended_in_vain = request.seen is not None and not request.is_erased and self._in_vain(request)
        return None if ended_in_vain else (asked, request)

    def _in(self, state: State) -> Iterable[Request]:
        return (each for each in self.requests.values() if each.state == state)

    @staticmethod
    def _in_vain(request: Request) -> bool:
        """For no fault of its own: its caller may try again."""
        if request.end == "its result":
            return request.wanted is not None and request.wanted.retryable
        return request.end in ("cancelled", "lost")

    # --- what happens ---

    def accept(self, job: Job, now: float) -> Request:
        """The request goes to the round after its tenant's last, or to the one that is served now."""
        deadline = None if job.start_timeout_s is None else now + job.start_timeout_s
        lane = [each for each in self.queued(job.model) if each.job.priority == job.priority]
        own = [each.round for each in lane if each.job.tenant == job.tenant]
        served_now = lane[0].round if lane else 0
        turn = max(served_now, own[-1] + 1) if own else served_now
        self.accepted += 1
        request = Request(job, self.accepted, turn, now, deadline)
        self.requests[job.request_id] = request
        return request

    def start(self, request: Request, owner: str, now: float) -> None:
        request.state = State.RUNNING
        request.attempts += 1
        request.owner, request.lease_until = owner, now + LEASE_S

    def put_back(self, request: Request, *, counts: bool, crashed: bool, delay_s: float, now: float) -> None:
        """It waits again at its old place, or ends."""
        request.crashes += crashed
        if request.cancel_asked:
            self.end(request, "cancelled", now)
            return
        retries = request.job.max_retries
        most = MAX_ATTEMPTS if retries is None else min(retries + 1, MAX_ATTEMPTS)
        if counts and (request.attempts >= most or request.crashes >= MAX_CRASHES):
            self.end(request, "lost", now)
            return
        request.state = State.QUEUED
        request.rests_until = now + (BACKOFFS_S[request.attempts] if counts else delay_s)
        request.attempts -= not counts

    def end(self, request: Request, end: End, now: float) -> None:
        request.state, request.end, request.ended_at = State.COMPLETED, end, now
        if request.job.webhook_url is not None:
            self.webhooks[request.job.request_id] = Webhook(DeliveryState.DUE, now)

    def owes(self, request_id: str) -> bool:
        return request_id in self.webhooks and self.webhooks[request_id].is_owed

    def erase(self, request: Request) -> None:
        request.is_erased = True
        request.log.clear()

    def sweep(self, now: float) -> int:
        """Do what is due. How many changes that were."""
        lapsed = [each for each in self.running() if each.lease_until < now]
        for each in lapsed:
            self.put_back(each, counts=True, crashed=False, delay_s=0.0, now=now)
        late = [each for each in self._in(State.QUEUED) if each.deadline is not None and each.deadline <= now]
        for each in late:
            self.end(each, "too late", now)
        ended = [each for each in self._in(State.COMPLETED) if not self.owes(each.job.request_id)]
        unkept = [each for each in ended if not each.job.stores_io and not each.is_erased]
        unkept = [each for each in unkept if now - each.ended_at >= UNKEPT_S]
        for each in unkept:
            self.erase(each)
        old = [each for each in ended if now - each.ended_at >= KEEP_S]
        for each in old:
            del self.requests[each.job.request_id]
            self.webhooks.pop(each.job.request_id, None)
        return len(lapsed) + len(late) + len(unkept) + len(old)

    # --- webhooks ---

    def due_webhooks(self, now: float) -> list[Webhook]:
        """What has waited longest comes first; those whose sender was not heard of wait again."""
        for each in self.webhooks.values():
            if each.state == DeliveryState.SENDING and each.lease_until <= now:
                each.state, each.due_at = DeliveryState.DUE, each.lease_until
        due = [each for each in self.webhooks.values() if each.state == DeliveryState.DUE]
        return sorted((each for each in due if each.due_at <= now), key=lambda each: each.due_at)

    def send(self, webhook: Webhook, now: float) -> None:
        webhook.state, webhook.lease_until = DeliveryState.SENDING, now + WEBHOOK_LEASE_S
        webhook.attempts += 1

    def last_try(self, request_id: str, attempt: int) -> Webhook | None:
        """The webhook, if it has not ended and nobody has taken it since."""
        webhook = self.webhooks.get(request_id)
        return webhook if webhook and webhook.is_owed and webhook.attempts == attempt else None
