"""Webhooks on their way to real receivers. Time is the clock's; only time limits pass by themselves."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.files.egress import Egress
from deployments.files.guard import IPAddress
from deployments.queue import Outbox, Queue, open_database
from deployments.queue.insistence import insist
from deployments.webhooks import sender as sender_module
from deployments.webhooks.keyring import Keyring
from deployments.webhooks.sender import (
    ANSWER_BYTES,
    BROKEN,
    FAILED,
    INTERRUPTED,
    SILENT,
    UNREACHABLE,
    Sender,
)
from schemas.deliveries import DeliveryRecord, DeliveryState, Outcome, Try
from schemas.errors import StoreClosed, StoreDown
from schemas.jobs import Job, JobResult
from schemas.settings import LeaseSettings, WebhookSettings
from tests.support.jobs import OUTPUT, Clock, make_job
from tests.support.receivers import Receiver, is_genuine, receiving

HERE = {"allowed_networks": ("127.0.0.0/8",), "allowed_ports": ()}
LIMIT_S = 10.0
Make = Callable[..., Sender]


async def resolve(host: str, port: int) -> list[IPAddress]:
    """Every host is this machine, but for one inside somebody's network."""
    return [ip_address("10.0.0.1" if host.startswith("inside") else "127.0.0.1")]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def queue(queue_url: str, clock: Clock) -> AsyncIterator[Queue]:
    queue = Queue(open_database(queue_url), LeaseSettings(), clock=clock)
    yield queue
    await queue.close()


@pytest.fixture
def outbox(queue: Queue, clock: Clock) -> Outbox:
    return Outbox(queue._database, 60.0, clock)


@pytest.fixture
def keyring(tmp_path: Path, clock: Clock) -> Keyring:
    return Keyring(tmp_path / "keys", 86_400, clock)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
async def make_sender(outbox: Outbox, keyring: Keyring) -> AsyncIterator[Make]:
    made: list[Sender] = []

    def make(chance: float = 0.5, **changes: Any) -> Sender:
        settings = WebhookSettings(**{**HERE, **changes})
        made.append(Sender(outbox, Egress(settings, resolve), keyring, settings, lambda: chance))
        return made[-1]

    yield make
    for sender in made:
        await sender.close()


@pytest.fixture
def sender(make_sender: Make) -> Sender:
    return make_sender()


async def owe(queue: Queue, url: str, traceparent: str | None = None) -> Job:
    job = make_job(webhook_url=url, tenant="alice", traceparent=traceparent)
    await queue.submit(job)
    [claim] = await queue.claim("flux", "one", 1)
    assert await queue.finish(claim, JobResult.success(OUTPUT, 0.5))
    return job


async def found(outbox: Outbox, job: Job) -> tuple[DeliveryRecord, list[Try]]:
    known = await outbox.find(job.request_id)
    assert known is not None
    return known


async def outcomes(outbox: Outbox, job: Job) -> list[Outcome]:
    """How each try went; the durations are nobody's to foresee."""
    _, log = await found(outbox, job)
    assert all(each.outcome is not None and each.outcome.duration_s >= 0 for each in log)
    return [replace(each.outcome, duration_s=0.0) for each in log if each.outcome]


async def send(sender: Sender) -> int:
    begun = await sender.look()
    await sender.idle()
    return begun


async def until_delivered(outbox: Outbox, job: Job) -> None:
    async with asyncio.timeout(LIMIT_S):
        while (await found(outbox, job))[0].state != DeliveryState.DELIVERED:
            pass


async def test_what_is_owed_arrives_signed_and_is_not_sent_again(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver, keyring: Keyring, clock: Clock
) -> None:
    job = await owe(queue, f"{receiver.url}/hook?token=1")
    assert await send(sender) == 1
    [post] = receiver.all()
    assert post.path == "/hook?token=1"
    assert post.headers["host"] == receiver.url.removeprefix("http://")
    assert is_genuine(post, keyring.jwks()["keys"], clock.now)
    assert post.headers["x-fal-webhook-user-id"] == "alice"
    assert job.request_id.encode() in post.body
    assert await outcomes(outbox, job) == [Outcome(200, None, 0.0)]
    clock.now += 10**6
    assert await send(sender) == 0
    assert receiver.all() == []


async def test_every_try_is_part_of_its_requests_trace_and_tells_no_url(
    queue: Queue, sender: Sender, receiver: Receiver, clock: Clock, spans: InMemorySpanExporter
) -> None:
    receiver.statuses["/secret-path?token=secret-token"] = [503, 200]
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    job = await owe(queue, f"{receiver.url}/secret-path?token=secret-token", traceparent=parent)
    await send(sender)
    clock.now += 10**4
    await send(sender)
    posts, told = receiver.all(), spans.get_finished_spans()
    assert [each.parent and f"{each.parent.span_id:016x}" for each in told] == ["b7ad6b7169203331"] * 2
    assert [post.headers["traceparent"] for post in posts] == [
        f"00-0af7651916cd43dd8448eb211c80319c-{each.context.span_id:016x}-01" for each in told if each.context
    ]
    common = {
        "darkroom.request.id": job.request_id,
        "http.request.method": "POST",
        "server.address": "127.0.0.1",
    }
    assert [each.attributes for each in told] == [
        {**common, "darkroom.attempt": 1, "http.response.status_code": 503, "error.type": "503"},
        {**common, "darkroom.attempt": 2, "http.response.status_code": 200},
    ]


async def test_the_loop_hears_of_what_falls_due(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver
) -> None:
    sender.start()
    assert sender.is_alive
    jobs = [await owe(queue, f"{receiver.url}/{number}") for number in range(6)]  # more than one host's room
    for job in jobs:
        await until_delivered(outbox, job)
    assert len(receiver.all()) == 6
    await sender.close()
    assert not sender.is_alive


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.9), (0.5, 1.0), (1.0, 1.1)])
async def test_failures_are_tried_again_by_the_schedule_each_signed_afresh(
    queue: Queue,
    outbox: Outbox,
    make_sender: Make,
    receiver: Receiver,
    keyring: Keyring,
    clock: Clock,
    chance: float,
    share: float,
) -> None:
    receiver.statuses["/down"] = [500]
    sender = make_sender(chance)
    job = await owe(queue, f"{receiver.url}/down")
    waits, signatures = [], set()
    while await send(sender):
        [post] = receiver.all()
        assert is_genuine(post, keyring.jwks()["keys"], clock.now)
        signatures.add(post.headers["x-fal-webhook-signature"])
        record, _ = await found(outbox, job)
        if record.next_attempt_at is not None:
            waits.append(record.next_attempt_at - clock.now)
            clock.now = record.next_attempt_at
    assert waits == pytest.approx([wait * share for wait in WebhookSettings().retries_s])
    assert sum(waits) == pytest.approx(7200 * share)
    assert len(signatures) == record.attempts == 11
    assert (record.state, record.last_status) == (DeliveryState.FAILED, 500)
    assert await outcomes(outbox, job) == [Outcome(500, None, 0.0)] * 11


async def test_it_ends_at_the_first_success(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver, clock: Clock
) -> None:
    receiver.statuses["/late"] = [503, 204]
    job = await owe(queue, f"{receiver.url}/late")
    for _ in range(4):
        await send(sender)
        clock.now += 10_000
    assert len(receiver.all()) == 2
    assert (await found(outbox, job))[0].state == DeliveryState.DELIVERED


async def test_everything_arrives_at_a_receiver_that_was_down_for_an_hour(
    queue: Queue, outbox: Outbox, make_sender: Make, receiver: Receiver, clock: Clock
) -> None:
    sender = make_sender(chance=0.25, per_host=4)
    receiver.statuses["/x"] = [503]
    jobs = [await owe(queue, f"{receiver.url}/x") for _ in range(4)]
    began = clock.now
    while clock.now < began + 7200:
        if clock.now >= began + 3600:
            receiver.statuses["/x"] = [200]
        await send(sender)
        clock.now += 120
    assert await outbox.newest(99, DeliveryState.DUE) == []
    assert len(await outbox.newest(99, DeliveryState.DELIVERED)) == len(jobs)


async def test_a_receiver_that_is_gone_hears_no_more(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver, clock: Clock
) -> None:
    receiver.statuses["/gone"] = [410]
    job = await owe(queue, f"{receiver.url}/gone")
    await send(sender)
    clock.now += 10**6
    assert await send(sender) == 0
    record, _ = await found(outbox, job)
    assert (record.state, record.last_status, record.attempts) == (DeliveryState.FAILED, 410, 1)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_t06_a_redirect_is_a_failure_and_not_followed(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver, status: int
) -> None:
    receiver.statuses["/moved"] = [status]
    receiver.locations["/moved"] = f"{receiver.url}/elsewhere"
    job = await owe(queue, f"{receiver.url}/moved")
    await send(sender)
    assert [post.path for post in receiver.all()] == ["/moved"]
    record, _ = await found(outbox, job)
    assert (record.state, record.last_status) == (DeliveryState.DUE, status)


async def test_a_receiver_that_hangs_up_has_not_taken_it(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver
) -> None:
    receiver.cut.add("/cut")
    job = await owe(queue, f"{receiver.url}/cut")
    await send(sender)
    assert await outcomes(outbox, job) == [Outcome(None, BROKEN, 0.0)]
    assert (await found(outbox, job))[0].state == DeliveryState.DUE


async def test_a_receiver_that_speaks_for_too_long_has_been_told(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver
) -> None:
    receiver.answers["/"] = b"x" * 100 * ANSWER_BYTES
    job = await owe(queue, f"{receiver.url}/")
    await send(sender)
    assert await outcomes(outbox, job) == [Outcome(200, None, 0.0)]
    assert (await found(outbox, job))[0].state == DeliveryState.DELIVERED


async def test_a_fault_of_ours_is_a_try_that_failed(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver, tmp_path: Path
) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "0.pem").write_text("nonsense")  # nothing can be signed
    job = await owe(queue, receiver.url)
    await send(sender)
    assert not receiver.all()
    assert await outcomes(outbox, job) == [Outcome(None, FAILED, 0.0)]
    assert (await found(outbox, job))[0].state == DeliveryState.DUE


async def test_the_loop_outlives_an_outbox_that_could_not_be_read(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    due_hosts, failures = outbox.due_hosts, [StoreDown("full"), StoreDown("full")]

    async def failing() -> list[str]:
        if failures:
            raise failures.pop()
        return await due_hosts()

    monkeypatch.setattr(outbox, "due_hosts", failing)
    monkeypatch.setattr(sender_module, "IDLE_S", 0.0)
    job = await owe(queue, receiver.url)
    sender.start()
    await asyncio.wait_for(until_delivered(outbox, job), LIMIT_S)
    assert not failures and sender.is_alive


async def test_a_receiver_that_is_silent_is_left_in_time(
    queue: Queue, outbox: Outbox, make_sender: Make, receiver: Receiver
) -> None:
    receiver.gates["/slow"] = threading.Event()
    job = await owe(queue, f"{receiver.url}/slow")
    await send(make_sender(timeout_s=0.2))
    assert await outcomes(outbox, job) == [Outcome(None, SILENT, 0.0)]
    assert (await found(outbox, job))[0].state == DeliveryState.DUE


async def test_a_slow_host_holds_nobody_else_up(
    queue: Queue, outbox: Outbox, make_sender: Make, receiver: Receiver
) -> None:
    receiver.gates["/slow"] = threading.Event()
    slow, quick = (receiver.url.replace("127.0.0.1", host) for host in ("slow.example", "quick.example"))
    stuck = [await owe(queue, f"{slow}/slow") for _ in range(20)]
    sender = make_sender(per_host=2, concurrency=4)
    for _ in range(3):
        job = await owe(queue, f"{quick}/quick")
        await sender.look()
        await until_delivered(outbox, job)
    states = [(await found(outbox, job))[0].state for job in stuck]
    assert states == [DeliveryState.SENDING] * 2 + [DeliveryState.DUE] * 18


@pytest.mark.parametrize("networks", [(), ("10.0.0.0/8",)])
async def test_t07_what_the_settings_forbid_is_not_reached_whatever_it_is_called(
    queue: Queue,
    outbox: Outbox,
    make_sender: Make,
    receiver: Receiver,
    networks: tuple[str, ...],
) -> None:
    """The submit was let through: by older settings, or because the name led elsewhere then."""
    sender = make_sender(allowed_networks=networks)
    urls = [receiver.url, receiver.url.replace("127.0.0.1", "rebound.example"), "ftp://there/", "http://["]
    jobs = [await owe(queue, url) for url in urls]
    await send(sender)
    assert receiver.all() == []
    for job in jobs:
        assert await outcomes(outbox, job) == [Outcome(None, UNREACHABLE, 0.0)]


async def test_t25_closed_and_forbidden_look_the_same(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver
) -> None:
    closed = await owe(queue, "http://127.0.0.1:1/")
    forbidden = await owe(queue, "http://inside.example:1/")
    await send(sender)
    assert await outcomes(outbox, closed) == await outcomes(outbox, forbidden)


def test_t25_nothing_that_a_receiver_says_is_kept_but_its_status() -> None:
    assert {each.name for each in fields(Outcome)} == {"status", "error", "duration_s"}


async def test_what_a_closing_sender_had_under_way_is_sent_by_the_next(
    queue: Queue, outbox: Outbox, make_sender: Make, receiver: Receiver
) -> None:
    receiver.gates["/x"] = threading.Event()
    job = await owe(queue, f"{receiver.url}/x")
    first = make_sender()
    await first.look()
    await asyncio.to_thread(receiver.next)
    await first.close()
    receiver.gates["/x"].set()
    assert await send(make_sender()) == 1
    assert await outcomes(outbox, job) == [Outcome(None, INTERRUPTED, 0.0), Outcome(200, None, 0.0)]


async def test_two_senders_send_everything_once(
    queue: Queue, outbox: Outbox, make_sender: Make, receiver: Receiver
) -> None:
    jobs = [await owe(queue, f"{receiver.url}/{number}") for number in range(20)]
    senders = [make_sender(per_host=3) for _ in range(2)]
    while sum(await asyncio.gather(*map(send, senders))):
        pass
    sent = sorted(post.headers["x-fal-webhook-request-id"] for post in receiver.all())
    assert sent == sorted(job.request_id for job in jobs)


async def test_a_database_that_fails_for_a_while_costs_time_only(
    queue: Queue, outbox: Outbox, sender: Sender, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle, failures = outbox.settle, [StoreDown("full"), StoreDown("full")]

    async def failing(*args: Any) -> bool:
        if failures:
            raise failures.pop()
        return await settle(*args)

    monkeypatch.setattr(outbox, "settle", failing)
    monkeypatch.setattr(sender_module, "IDLE_S", 0.0)
    job = await owe(queue, receiver.url)
    await send(sender)
    assert len(receiver.all()) == 1
    assert (await found(outbox, job))[0].state == DeliveryState.DELIVERED


async def test_nobody_insists_on_a_database_that_this_process_has_closed(
    queue_url: str, queue: Queue, outbox: Outbox
) -> None:
    await owe(queue, "http://there.example/hook")
    closed = Outbox(open_database(queue_url), 60.0)
    [delivery] = await outbox.claim({"there.example": 1})
    await closed.close()
    with pytest.raises(StoreClosed):
        await asyncio.wait_for(insist(partial(closed.release, delivery, Outcome(200, None, 0.0))), LIMIT_S)


async def test_t23_nothing_secret_is_logged(
    queue: Queue,
    outbox: Outbox,
    sender: Sender,
    receiver: Receiver,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    await owe(queue, f"{receiver.url}/hook?token=canary")
    await owe(queue, "http://127.0.0.1:1/?token=canary")
    await send(sender)
    assert caplog.records
    assert "canary" not in caplog.text
    assert (tmp_path / "keys" / "0.pem").read_text().splitlines()[1] not in caplog.text
