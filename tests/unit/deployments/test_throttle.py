"""Wrong keys, by address."""

from typing import Any

import pytest

from deployments.gateway.throttle import MAX_ADDRESSES, WINDOW_S, Throttle, address_of
from schemas.errors import TooManyRequests
from tests.support.jobs import Clock


def test_t02_a_minute_has_so_many_failures_of_an_address() -> None:
    clock = Clock()
    throttle = Throttle(2, clock)
    for _ in range(2):
        throttle.failed("192.0.2.1")
    clock.now += WINDOW_S - 1
    for _ in range(2):
        with pytest.raises(TooManyRequests) as refused:
            throttle.failed("192.0.2.1")
        assert refused.value.retry_after_s == 1
    throttle.failed("192.0.2.2")
    throttle.failed(None)
    clock.now += 1
    throttle.failed("192.0.2.1")


def test_t02_only_so_many_addresses_are_remembered() -> None:
    throttle = Throttle(1, Clock())
    for number in range(MAX_ADDRESSES + 100):
        throttle.failed(str(number))
    assert len(throttle._failures) == MAX_ADDRESSES
    throttle.failed("0")  # was forgotten
    with pytest.raises(TooManyRequests):
        throttle.failed(str(MAX_ADDRESSES))


def scope(client: str | None, *forwarded: str) -> dict[str, Any]:
    headers = [(b"x-forwarded-for", each.encode()) for each in forwarded]
    return {"type": "http", "client": client and (client, 4711), "headers": headers}


@pytest.mark.parametrize(
    ("client", "forwarded", "proxies", "address"),
    [
        ("192.0.2.1", [], 0, "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.9"], 0, "192.0.2.1"),  # anybody can write that
        ("10.0.0.1", ["198.51.100.9"], 1, "198.51.100.9"),
        ("10.0.0.1", ["203.0.113.5, 198.51.100.9"], 1, "198.51.100.9"),  # the rest is the client's own word
        ("10.0.0.1", ["203.0.113.5", " 198.51.100.9 "], 1, "198.51.100.9"),
        ("10.0.0.1", ["203.0.113.5, 198.51.100.9"], 2, "203.0.113.5"),
        ("10.0.0.1", ["198.51.100.9"], 2, None),  # came another way
        ("10.0.0.1", [], 1, None),
        ("10.0.0.1", ["nonsense"], 1, None),
        ("10.0.0.1", ["," * 10_000 + "198.51.100.9"], 1, "198.51.100.9"),
        ("2001:db8:1:2:3:4:5:6", [], 0, "2001:db8:1:2::"),  # one client has all of these
        ("fe80::1%eth0", [], 0, "fe80::"),
        ("::ffff:192.0.2.1", [], 0, "192.0.2.1"),
        ("/run/socket", [], 0, None),
        (None, [], 0, None),
    ],
)
def test_the_address_is_the_clients(
    client: str | None, forwarded: list[str], proxies: int, address: str | None
) -> None:
    assert address_of(scope(client, *forwarded), proxies) == address
