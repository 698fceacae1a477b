"""What is no fault of a process: backlogs, turns, deadlines, receivers that fail; and all of it for long."""

import asyncio
import random
import time

from deployments.queue.lookup import MAX_POSITION
from schemas.jobs import Priority
from tests.faults import loads, processes
from tests.faults.fronts import Place, finish, front
from tests.faults.judging import verdict
from tests.faults.telling import Client
from tests.faults.test_processes import events, freeze, kill, wake
from tests.support.receivers import Receiver

SHORT_SOAK_S, LONG_SOAK_S = 6.0, 1200.0


async def test_f20_a_long_backlog_is_claimed_in_its_order(
    place: Place, receiver: Receiver, scale: int
) -> None:
    count = 1000 if scale == 1 else 100_000
    async with front(place) as one:
        for _ in range(count // 500):
            await asyncio.gather(*(one.client.submit() for _ in range(500)))
        last = await one.client.submit()
        assert last is not None
        record = await one.queue.get(last, "alice")
        assert record is not None
        assert record.position == min(count, MAX_POSITION)
        order = [each["id"] for each in events(place, "accepted")]
        taken = [claim for _ in range(5) for claim in await one.queue.claim("flux", "one", 20)]
        assert {each.job.request_id for each in taken} <= set(order[:600])  # as the commits were answered
        assert len({each.job.request_id for each in taken}) == 100


async def test_f21_normal_goes_before_low_and_each_tenant_keeps_its_order(
    place: Place, receiver: Receiver
) -> None:
    chance = random.Random(3)
    async with front(place) as one:
        clients = [Client(one.queue, one.history, name) for name in ("alice", "bob")]
        for _ in range(60):
            await chance.choice(clients).submit(priority=chance.choice(list(Priority)))
        await one.serve(window=2)
        await one.end()
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []


async def test_f22_nothing_starts_after_its_start_deadline(place: Place, receiver: Receiver) -> None:
    chance = random.Random(5)
    async with front(place) as one:
        await one.serve(window=1)
        for _ in range(80):
            timeout_s = chance.choice([0.05, 0.2, 5, 60, None])
            await one.client.submit("slow", start_timeout_s=timeout_s)
        await one.end()
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
    late = {each["id"] for each in events(place, "final") if each["status"] == 504}
    assert late
    began = {each["id"] for each in events(place, "began")}
    assert began.isdisjoint(late)


async def test_f26_a_receiver_that_fails_is_told_again_and_one_that_took_it_is_not(
    place: Place, receiver: Receiver
) -> None:
    receiver.statuses["/gone"] = [410]
    async with front(place) as one:
        await one.serve()
        for name in ("flaky", "plain", "gone"):
            await one.client.submit(webhook_url=place.hook(name))
        await one.drain()
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
    assert len(events(place, "posted")) == 2 + 1 + 1


def test_f30_everything_at_once_for_a_while(place: Place, receiver: Receiver, scale: int) -> None:
    chance = random.Random(13)
    until = time.monotonic() + (SHORT_SOAK_S if scale == 1 else LONG_SOAK_S)
    servers = [processes.start(loads.serve, place) for _ in range(2)]
    seed = 100
    while time.monotonic() < until:
        seed += 1
        caller = processes.start(loads.call, place, seed, 15)
        number = chance.randrange(2)
        if chance.random() < 0.5:
            kill(place, servers[number])
            servers[number] = processes.start(loads.serve, place)
        else:
            freeze(place, servers[number])
            time.sleep(chance.uniform(0, 2 * loads.SHORT.lease_s))
            wake(servers[number])
        caller.join()
        assert caller.exitcode == 0
    for server in servers:
        kill(place, server)
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
