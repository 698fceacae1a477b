"""How often an address may show a key that is none."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from math import ceil

from starlette.datastructures import Headers
from starlette.types import Scope

from schemas.errors import TooManyRequests

WINDOW_S = 60.0
MAX_ADDRESSES = 10_000  # that are remembered; the one that began longest ago is forgotten first
MAX_TEXT = 1000  # of an X-Forwarded-For header
IPV6_NETWORK = 64  # bits; below it one client has as many addresses as it likes


@dataclass(slots=True)
class _Failures:
    count: int
    ends_at: float  # when they are forgotten


class Throttle:
    """Counts failures by address. Whoever fails too often is told so; whoever does not fail never is.

    One per process. `clock` gives seconds that only grow.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    def failed(self, address: str | None) -> None:
        """One more failure. Raises TooManyRequests beyond the limit."""
        now, name = self._clock(), address or ""
        failures = self._failures.get(name)
        if failures is None or failures.ends_at <= now:
            self._failures.pop(name, None)
            failures = self._failures[name] = _Failures(0, now + WINDOW_S)
            if len(self._failures) > MAX_ADDRESSES:
                self._failures.popitem(last=False)
        failures.count += 1
        if failures.count > self._limit:
            raise TooManyRequests("Too many wrong keys from this address.", ceil(failures.ends_at - now))


def address_of(scope: Scope, proxies: int) -> str | None:
    """The client's address, an IPv6 one as its network. None where it cannot be told.

    It is the other end of the connection; or, behind so many proxies of the operator's, what the outermost of
    them has added to X-Forwarded-For. What stands before that in the header is anybody's word.
    """
    text = scope["client"][0] if scope.get("client") else ""
    if proxies:
        told = ",".join(Headers(scope=scope).getlist("x-forwarded-for"))[-MAX_TEXT:].split(",")
        text = told[-proxies].strip() if len(told) >= proxies else ""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
        network = ip_network(f"{IPv6Address(int(address))}/{IPV6_NETWORK}", strict=False)
        return str(network.network_address)
    return str(getattr(address, "ipv4_mapped", None) or address)
