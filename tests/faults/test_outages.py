"""PostgreSQL goes down, and its connections break, while clients call and dispatchers run."""

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from deployments.queue.postgres import WRITING
from tests.faults import loads, processes
from tests.faults.fronts import Place, finish, front
from tests.faults.judging import prepare, verdict
from tests.faults.network import Network, anywhere, network_to
from tests.faults.test_processes import events, kill, wait_for
from tests.support.postgres import USER, PostgresServer, postgres_at_work
from tests.support.receivers import Receiver

PATIENCE_S = 120.0
DOWN_S = 3.0  # in the short form; 30 in the long one


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """One that may be stopped."""
    with postgres_at_work() as server:
        yield server


@pytest.fixture
def place(server: PostgresServer, tmp_path: Path, receiver: Receiver) -> Place:
    prepare(receiver)
    return Place(tmp_path / "place", server.new_database(), receiver.url).clear()


@pytest.fixture
def network(server: PostgresServer) -> Iterator[Network]:
    with network_to(server.folder / ".s.PGSQL.5432") as network:
        yield network


def behind(network: Network, place: Place) -> Place:
    """The same place as it is reached through the network."""
    url = f"postgresql://{USER}@127.0.0.1:{network.port}/{_name(place)}"
    return Place(place.folder, url, place.receiver_url)


def test_f09_a_database_that_is_down_costs_time_only(
    server: PostgresServer, place: Place, receiver: Receiver, scale: int
) -> None:
    servers = [processes.start(loads.serve, place) for _ in range(2)]
    callers = [processes.start(loads.call, place, seed, 40 * scale) for seed in (3, 4)]
    wait_for(place, "committed", 5)
    server.stop(immediately=True)
    down_at = time.monotonic()
    time.sleep(DOWN_S if scale == 1 else 30.0)  # the outage itself
    up_at = time.monotonic()
    server.start()
    for _ in range(0 if scale == 1 else 5 * scale):  # as DBOS does
        time.sleep(random.uniform(5, 20))
        server.stop(immediately=True)
        time.sleep(random.uniform(0, 5))
        server.start()
    for caller in callers:
        caller.join(PATIENCE_S * scale)
        assert caller.exitcode == 0
    for each in servers:
        kill(place, each)
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []
    asked = {each["id"]: each["at"] for each in events(place, "submit")}
    meanwhile = [
        each for each in events(place, "accepted") if asked[each["of"]] > down_at and each["at"] < up_at
    ]
    assert meanwhile == []
    assert any(down_at < asked[each["of"]] < up_at for each in events(place, "refused"))
    assert len({each["id"] for each in events(place, "accepted")}) == 80 * scale


def test_f10_sessions_that_are_ended_mid_transaction_lose_nothing(
    place: Place, receiver: Receiver, scale: int
) -> None:
    servers = [processes.start(loads.serve, place) for _ in range(2)]
    caller = processes.start(loads.call, place, 5, 60 * scale)
    wait_for(place, "committed", 3)
    with psycopg.connect(place.queue_url, autocommit=True) as connection:
        ended = 0
        while caller.is_alive():
            ended += connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND random() < 0.3"
            ).rowcount
            time.sleep(0.05)
    caller.join(PATIENCE_S)
    assert caller.exitcode == 0
    assert ended > 10
    for each in servers:
        kill(place, each)
    assert processes.run(finish, place) == 0
    assert verdict(place, receiver) == []


async def test_f10_a_connection_that_is_cut_at_any_byte_loses_nothing_and_doubles_nothing(
    network: Network, place: Place, receiver: Receiver, scale: int
) -> None:
    chance = random.Random(7)
    async with front(behind(network, place)) as one:
        for _ in range(60 * scale):
            network.budget = anywhere(chance)
            await one.client.insist(webhook_url=chance.choice([None, place.hook()]))
        assert network.cuts > 20 * scale
        await one.serve()
        for _ in range(10 * scale):
            network.budget = 10 * anywhere(chance)
            await one.client.insist("slow")
        network.budget = None
    assert await asyncio.to_thread(processes.run, finish, place) == 0
    assert verdict(place, receiver) == []
    assert len(events(place, "final")) == 70 * scale


async def test_f10_a_network_that_refuses_and_stalls_costs_time_only(
    network: Network, place: Place, receiver: Receiver
) -> None:
    async with front(behind(network, place)) as one:
        await one.serve()
        network.refuses, network.budget = True, 0
        assert await one.client.submit() is None
        assert await one.client.submit() is None
        network.refuses, network.budget = False, None
        await one.client.insist()
        network.is_stalled = True
        waiting = asyncio.create_task(one.client.insist("slow"))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        network.is_stalled = False
        await waiting
    assert await asyncio.to_thread(processes.run, finish, place) == 0
    assert verdict(place, receiver) == []


async def test_f10_writes_that_wait_for_a_lock_are_not_lost(place: Place, receiver: Receiver) -> None:
    async with front(place) as one:
        with psycopg.connect(place.queue_url) as connection:
            connection.execute(f"SELECT pg_advisory_xact_lock({WRITING})".encode())
            waiting = [asyncio.create_task(one.client.submit()) for _ in range(20)]
            await asyncio.wait(waiting, timeout=0.3)
            assert not any(each.done() for each in waiting)
        assert all(await asyncio.gather(*waiting))
    assert await asyncio.to_thread(processes.run, finish, place) == 0
    assert verdict(place, receiver) == []


def test_f11_after_a_restore_what_came_later_is_unknown_and_no_id_is_used_again(
    server: PostgresServer, place: Place, receiver: Receiver
) -> None:
    """A copy of the database takes the part of the backup."""
    assert processes.run(loads.bring, place, 5, None) == 0
    copy = server.new_database(template=_name(place))
    before = {each["id"] for each in events(place, "accepted")}
    assert processes.run(loads.bring, place, 5, None) == 0
    lost = {each["id"] for each in events(place, "accepted")} - before
    restored = Place(place.folder / "restored", copy, receiver.url).clear()
    assert processes.run(loads.look_for, restored, sorted(before), sorted(lost)) == 0
    assert processes.run(loads.bring, restored, 5, None) == 0
    again = {each["id"] for each in events(restored, "accepted")}
    assert again.isdisjoint(before | lost)


def _name(place: Place) -> str:
    return place.queue_url.partition("?")[0].rpartition("/")[2]
