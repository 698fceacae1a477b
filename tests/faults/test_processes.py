"""Dispatchers are killed, frozen and doubled while clients call."""

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.faults import loads, processes
from tests.faults.fronts import Place, Watch, finish, front
from tests.faults.history import Event, History
from tests.faults.judging import verdict
from tests.support.receivers import Receiver

CALLS = 40
PATIENCE_S = 60.0


def events(place: Place, kind: str) -> list[Event]:
    history = History(place.history)
    found = [each for each in history.read() if each["kind"] == kind]
    history.close()
    return found


def wait_for(place: Place, kind: str, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(events(place, kind)) < count:
        assert time.monotonic() < deadline, f"fewer than {count} of {kind}"
        time.sleep(0.01)


def kill(place: Place, process: BaseProcess) -> None:
    process.kill()
    process.join()
    History(place.history).write("killed", what="a dispatcher")


def freeze(place: Place, process: BaseProcess) -> None:
    """Stop a process outside of a transaction: in one, it holds up everybody who writes to SQLite."""
    assert process.pid is not None
    while True:
        os.kill(process.pid, signal.SIGSTOP)
        if processes.run(loads.write_at_once, place) == 0:
            return
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.01)


def wake(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)


def test_f01_f08_f28_two_dispatchers_that_are_killed_again_and_again_lose_nothing(
    place: Place, receiver: Receiver, scale: int
) -> None:
    chance = random.Random(1)
    callers = [processes.start(loads.call, place, seed, CALLS * scale) for seed in (1, 2)]
    servers = [processes.start(loads.serve, place) for _ in range(2)]
    kills = 0
    while any(caller.is_alive() for caller in callers) or kills < 6 * scale:
        wait_for(place, "claimed", len(events(place, "claimed")) + chance.choice([0, 0, 1]))
        time.sleep(chance.uniform(0.05, 0.5))
        number = chance.randrange(2)
        kill(place, servers[number])
        kills += 1
        servers[number] = processes.start(loads.serve, place)
        if kills > 40 * scale:
            break
    for caller in callers:
        caller.join(PATIENCE_S)
        assert caller.exitcode == 0
    for server in servers:
        kill(place, server)
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
    assert len(events(place, "final")) == 2 * CALLS * scale


def test_f02_a_dispatcher_that_is_frozen_past_its_lease_cannot_commit_any_more(
    place: Place, receiver: Receiver, tmp_path: Path
) -> None:
    gate = tmp_path / "open"
    first = processes.start(loads.serve, place)
    assert processes.run(loads.submit_gated, place, str(gate)) == 0
    wait_for(place, "began", 1)
    freeze(place, first)
    second = processes.start(loads.serve, place)
    wait_for(place, "began", 2)  # the lease has lapsed
    gate.touch()
    wait_for(place, "committed", 1)
    wake(first)
    assert processes.run(loads.submit_gated, place, str(gate)) == 0
    wait_for(place, "committed", 2)
    for process in (first, second):
        kill(place, process)
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []


async def test_f15_a_poison_ends_its_process_exactly_three_times_and_nothing_else(
    place: Place, receiver: Receiver
) -> None:
    async with front(place, artist=loads.Workers) as one:
        poison = await one.client.submit("poison", webhook_url=place.hook())
        neighbours = [await one.client.submit() for _ in range(8)]
        await one.serve()
        await one.drain()
    deaths = events(place, "worker")
    assert [(each["id"], each["code"]) for each in deaths] == [(poison, loads.POISONED)] * 3
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
    ends = {each["id"]: each for each in events(place, "final")}
    assert ends[str(poison)]["status"] == 503
    assert {ends[str(each)]["status"] for each in neighbours} == {200}


async def test_f16_f23_a_request_that_never_ends_is_given_up_and_its_neighbours_go_on(
    place: Place, receiver: Receiver
) -> None:
    async with front(place) as one:
        hangs = [await one.client.submit("hang", webhook_url=place.hook()) for _ in range(3)]
        neighbours = [await one.client.submit("slow") for _ in range(8)]
        await one.serve(window=4, run_limit_s=0.3)
        await one.drain()
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
    ends = {each["id"]: each for each in events(place, "final")}
    assert {ends[str(each)]["error_type"] for each in hangs} == {"request_timeout"}
    assert {ends[str(each)]["status"] for each in neighbours} == {200}


def test_f18_one_key_fifty_times_at_once_by_two_processes_is_one_request(
    place: Place, receiver: Receiver
) -> None:
    callers = [processes.start(loads.submit_under, place, "k", 25) for _ in range(2)]
    for caller in callers:
        caller.join(PATIENCE_S)
        assert caller.exitcode == 0
    assert processes.run(finish, place) == 0
    assert processes.run(loads.submit_under, place, "k", 5) == 0  # also after its end
    assert verdict(place, receiver) == []
    assert len({each["id"] for each in events(place, "accepted")}) == 1
    assert len(events(place, "accepted")) == 55
    assert len(events(place, "final")) == 1


def test_f19_what_is_accepted_in_an_overload_stays_accepted(
    place: Place, receiver: Receiver, scale: int
) -> None:
    server = processes.start(loads.serve, place)
    callers = [processes.start(loads.bring, place, 250 * scale, 50) for _ in range(2)]
    for caller in callers:
        caller.join(PATIENCE_S * scale)
        assert caller.exitcode == 0
    kill(place, server)
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
    kept, refused = events(place, "accepted"), events(place, "refused")
    assert len(kept) + len(refused) == 500 * scale
    assert len(kept) == len(events(place, "final"))
    assert refused and not any(each["is_unknown"] for each in refused)


async def test_f17_a_clock_that_jumps_loses_nothing_and_doubles_nothing(
    place: Place, receiver: Receiver
) -> None:
    clock = Watch()
    async with front(place, clock=clock, lease=loads.SHORT) as one:
        await one.serve()
        for ahead_s in (3600, 0, -3600, 3600, 0):
            for timeout_s in (None, 30, None):
                await one.client.submit("slow", start_timeout_s=timeout_s, webhook_url=place.hook())
            clock.ahead_s = ahead_s
        await one.end()
    assert processes.run(finish, place, 2 * 3600.0) == 0
    found = verdict(place, receiver, trusts_clocks=False)
    patient = {each["id"] for each in events(place, "submit") if each["deadline"] is None}
    # a start deadline is a time on a clock that jumped: it may be met or missed by the jump alone, and who
    # has one is passed over while it seems to be missed; and the lease on a webhook that is being sent may
    # lapse by it
    wrong = [each for each in found if not each.startswith(("I10", "I6"))]
    assert [each for each in wrong if not each.startswith("I12") or each.split()[-1] in patient] == []
    ends = {each["id"]: each["status"] for each in events(place, "final")}
    assert len(ends) == 15
    assert {ends[each] for each in patient} == {200}
