"""A cancel and what it races with: whoever wins, both answers agree."""

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any
from uuid import uuid4

from deployments.queue import Setback, open_database
from schemas.jobs import Claim, JobResult
from tests.faults import processes
from tests.faults.fronts import LEASE, Place, finish, front
from tests.faults.history import History
from tests.faults.judging import verdict
from tests.faults.telling import Client, TellingQueue
from tests.faults.test_processes import events
from tests.support.receivers import Receiver

RACES = 1000  # at least
AT_ONCE = 50

Move = Coroutine[Any, Any, object]


async def test_f24_a_cancel_and_what_it_races_with_agree_on_who_won(
    place: Place, receiver: Receiver, scale: int
) -> None:
    chance = random.Random(11)
    async with front(place) as one:
        elsewhere = TellingQueue(one.history, open_database(place.queue_url), LEASE)
        caller = Client(elsewhere, one.history)
        for _ in range(RACES * scale // AT_ONCE):
            names = await asyncio.gather(*(one.client.submit() for _ in range(AT_ONCE)))
            claims = await one.queue.claim("flux", "one", AT_ONCE // 2)  # the rest are claimed in the race
            moves = [*_cancels(caller, names), *_ends(one.queue, one.history, claims, chance)]
            moves.append(_claim_and_end(one.queue, one.history, chance))
            chance.shuffle(moves)
            await asyncio.gather(*(_after(chance.randrange(30), each) for each in moves))
        await elsewhere.close()
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
    outcomes = Counter(each["outcome"] for each in events(place, "cancelled"))
    assert sum(outcomes.values()) == RACES * scale
    assert min(outcomes["requested"], outcomes["already_completed"]) > RACES * scale / 50, outcomes


def _cancels(caller: Client, names: Sequence[str | None]) -> Iterator[Move]:
    for name in names:
        assert name is not None
        yield caller.cancel(name)


def _ends(
    queue: TellingQueue, history: History, claims: Sequence[Claim], chance: random.Random
) -> Iterator[Move]:
    """Most are committed, some given back, some lost with their worker."""
    for claim in claims:
        nonce = uuid4().hex
        history.write("began", id=claim.job.request_id, nonce=nonce, clock=queue.now())
        way = chance.random()
        if way < 0.8:
            yield queue.finish(claim, JobResult.success({"nonce": nonce}, 0.1))
        else:
            yield queue.release(claim, Setback.RETURNED if way < 0.9 else Setback.CRASHED)


async def _claim_and_end(queue: TellingQueue, history: History, chance: random.Random) -> None:
    claims = await queue.claim("flux", "one", AT_ONCE)
    await asyncio.gather(*_ends(queue, history, claims, chance))


async def _after(turns: int, move: Move) -> None:
    """Make a move some turns of the loop later."""
    for _ in range(turns):
        await asyncio.sleep(0)
    await move
