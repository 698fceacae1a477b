"""Sends the webhooks that are owed: signed afresh at each try, tried again by the schedule, written down.

A webhook is done at the first answer of 2xx, and given up at a 410 or at the schedule's end. Any other
answer, redirects included, is a failure. It is sent at least once: a receiver whose answer is lost, or
whose sender dies before it is written down, hears again under the same request id.
"""

import asyncio
import contextvars
import logging
import random
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any

import httpx

from deployments import crash, logs, metrics, traces
from deployments.files.egress import Egress
from deployments.files.guard import parse
from deployments.queue import Outbox
from deployments.queue.insistence import insist
from deployments.webhooks import message
from deployments.webhooks.keyring import Keyring
from schemas.deliveries import Delivery, DeliveryState, Outcome
from schemas.errors import AssetError
from schemas.settings import WebhookSettings

logger = logging.getLogger(__name__)

IDLE_S = 1.0  # the longest time between two looks
GATHER_S = 0.01  # the shortest: every commit of the server rings
ANSWER_BYTES = 2**16  # of an answer that are heard before the connection is closed; none is kept
GONE = 410  # the receiver wants no more

# A failure says no more than this to the log: what is closed, what is silent and what the settings refuse
# must look the same, or callers could map a network with us.
UNREACHABLE = "The receiver could not be reached."
BROKEN = "The connection broke before an answer came."
SILENT = "No answer came in time."
INTERRUPTED = "The sender was stopped."
FAILED = "The sender failed; the server's log says why."


class Sender:
    """One per front; several do no harm. `chance` gives numbers from 0 to 1, for the jitter."""

    def __init__(
        self,
        outbox: Outbox,
        egress: Egress,
        keyring: Keyring,
        settings: WebhookSettings,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._outbox = outbox
        self._egress = egress
        self._keyring = keyring
        self._settings = settings
        self._chance = chance
        self._sending: dict[asyncio.Task[None], Delivery] = {}
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Send what is due, from now on."""
        self._loop = _detached(self._run())

    @property
    def is_alive(self) -> bool:
        return self._outbox.is_alive and (self._loop is None or not self._loop.done())

    async def close(self) -> None:
        """Stop, and give back what is under way: another sender takes it at once."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait([self._loop])
        for task in self._sending:
            task.cancel()
        await self.idle()

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        while self._sending:
            await asyncio.wait(list(self._sending))

    async def look(self) -> int:
        """Begin to send what is due and has room. Returns how many were begun."""
        rooms = self._rooms(await self._outbox.due_hosts())
        begun = await self._outbox.claim(rooms) if rooms else []
        for delivery in begun:
            crash.point("sender.begins")
            self._begin(delivery)
        return len(begun)

    async def _run(self) -> None:
        """Look, wait for a change; for ever."""
        while True:
            begun = 0
            try:
                begun = await self.look()
            except Exception:
                logger.exception("the webhooks that are due could not be read")
            await asyncio.sleep(GATHER_S)
            if not begun:
                await self._outbox.changed(IDLE_S)

    def _rooms(self, hosts: Iterable[str]) -> dict[str, int]:
        """How many more may go to each host. In no order, so that none always comes last."""
        busy = Counter(delivery.host for delivery in self._sending.values())
        left = self._settings.concurrency - len(self._sending)
        rooms: dict[str, int] = {}
        for host in sorted(hosts, key=lambda _: self._chance()):
            room = min(left, self._settings.per_host - busy[host])
            if room > 0:
                rooms[host] = room
                left -= room
        return rooms

    def _begin(self, delivery: Delivery) -> None:
        task = _detached(self._send(delivery))
        self._sending[task] = delivery

        def forget(_: asyncio.Task[None]) -> None:
            del self._sending[task]
            self._outbox.wake()  # there is room again

        task.add_done_callback(forget)

    async def _send(self, delivery: Delivery) -> None:
        """One try, and what becomes of it."""
        with logs.about(delivery.request_id, delivery.traceparent):
            await self._send_it(delivery)

    async def _send_it(self, delivery: Delivery) -> None:
        began = asyncio.get_running_loop().time()

        def outcome(status: int | None, error: str | None) -> Outcome:
            return Outcome(status, error, round(asyncio.get_running_loop().time() - began, 4))

        try:
            with traces.span("POST", delivery.traceparent, _told_of(delivery), "CLIENT") as span:
                went = outcome(*await self._try(delivery, span))
                span.received(went.status, went.error)
        except asyncio.CancelledError:
            await insist(partial(self._outbox.release, delivery, outcome(None, INTERRUPTED)))
            return
        except Exception:
            logger.exception("the webhook of %s could not be sent", delivery.request_id)
            went = outcome(None, FAILED)
        await self._settle(delivery, went)

    async def _try(self, delivery: Delivery, span: traces.Span) -> tuple[int | None, str | None]:
        """The receiver's status, or what went wrong."""
        status = None
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                place = await self._egress.find(parse(delivery.url))
                content = message.body(delivery.request_id, delivery.status, delivery.body)
                headers = message.headers(
                    self._keyring.sign, delivery.request_id, delivery.tenant, self._outbox.now(), content
                )
                silence_s = self._settings.timeout_s
                crash.point("sender.signed")
                async with self._egress.ask(
                    place, "POST", headers | span.headers, silence_s, content
                ) as response:
                    status = response.status_code
                    crash.point("sender.answered")
                    await _hear_out(response)
        except (AssetError, httpx.ConnectError, httpx.ConnectTimeout) as error:
            logger.info("the webhook of %s: %s", delivery.request_id, error)
            return status, UNREACHABLE
        except TimeoutError:
            return status, None if status else SILENT
        except (httpx.TransportError, ssl.SSLError) as error:
            logger.info("the webhook of %s: %s", delivery.request_id, error)
            return status, None if status else BROKEN
        return status, None

    async def _settle(self, delivery: Delivery, outcome: Outcome) -> None:
        """Write a try down, with what follows from it."""
        state, wait_s = self._verdict(delivery, outcome)
        metrics.WEBHOOKS.add(outcome="retry" if state is DeliveryState.DUE else str(state))
        again_at = None if wait_s is None else self._outbox.now() + wait_s
        logger.info(
            "the webhook of %s, try %d: %s (%s)",
            delivery.request_id,
            delivery.attempt,
            outcome.status or outcome.error,
            state,
        )
        crash.point("sender.settles")
        await insist(partial(self._outbox.settle, delivery, outcome, state, again_at))
        crash.point("sender.settled")

    def _verdict(self, delivery: Delivery, outcome: Outcome) -> tuple[DeliveryState, float | None]:
        """What becomes of a webhook, and the seconds until its next try."""
        if outcome.status is not None and 200 <= outcome.status < 300:
            return DeliveryState.DELIVERED, None
        if outcome.status == GONE or delivery.retries >= len(self._settings.retries_s):
            return DeliveryState.FAILED, None
        share = self._settings.jitter * (2 * self._chance() - 1)
        return DeliveryState.DUE, self._settings.retries_s[delivery.retries] * (1 + share)


def _told_of(delivery: Delivery) -> dict[str, str | int]:
    """What its span says of a try: never the URL, whose path and query are the caller's secret."""
    return {
        "darkroom.request.id": delivery.request_id,
        "http.request.method": "POST",
        "server.address": delivery.host,
        "darkroom.attempt": delivery.attempt,
    }


async def _hear_out(response: httpx.Response) -> None:
    """Let a receiver speak, within bounds: closing on what it still says would look like a fault to it."""
    heard = 0
    async for chunk in response.aiter_raw():
        heard += len(chunk)
        if heard > ANSWER_BYTES:
            return


def _detached(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task in a clean context: it outlives whoever starts it."""
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())
