"""Which addresses a URL in a request may reach. Pure: it neither resolves nor connects.

The rule is an allow-list by our own table, because the standard library's judgement depends on the
Python release: an address is public when it lies where IANA gives out global unicast space, and in
no block that IANA keeps for a special purpose.
"""

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import httpx

from schemas.errors import AssetError
from schemas.settings import ReachSettings

IPAddress = IPv4Address | IPv6Address

# One text for every refused address: it must not tell which internal names and hosts exist.
REFUSED = "The address may not be reached."

_SPECIAL_V4 = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's platform services: public by its number only
        "169.254.0.0/16",  # link-local, cloud metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# Outside of it lie loopback, link-local, unique local, multicast, and the forms that carry an IPv4
# address: mapped, compatible, translated (::ffff:0:0:0/96) and NAT64.
_GLOBAL_V6 = IPv6Network("2000::/3")
_SPECIAL_V6 = tuple(
    IPv6Network(block)
    for block in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID, AMT, AS112
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_ISATAP = (0x00005EFE, 0x02005EFE)  # the upper half of an interface id; the lower is an IPv4 address


def is_public(address: IPAddress) -> bool:
    """Whether the address belongs to the public internet."""
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _SPECIAL_V4)
    if address not in _GLOBAL_V6 or any(address in block for block in _SPECIAL_V6):
        return False
    interface = int(address) & 0xFFFF_FFFF_FFFF_FFFF
    return interface >> 32 not in _ISATAP or is_public(IPv4Address(interface & 0xFFFF_FFFF))


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL would connect to. `host` is ASCII, without brackets."""

    scheme: str
    host: str
    port: int


_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
_IPV6 = re.compile(r"[0-9a-f:.]*:[0-9a-f:.]*")  # no zone: it would name a network card


class Guard:
    """Holds URLs and the addresses behind them against the settings. Raises AssetError."""

    def __init__(self, settings: ReachSettings) -> None:
        self._networks = tuple(ip_network(block) for block in settings.allowed_networks)
        self._ports = settings.allowed_ports

    def check_url(self, url: httpx.URL) -> Target:
        """Where `url` leads, if its scheme, host and port are ones that may be asked for."""
        if url.scheme not in _PORTS:
            raise _refusal("Only http and https URLs can be fetched.")
        if url.userinfo:
            raise _refusal("A URL must not carry a user name or a password.")
        try:
            host = url.raw_host.decode("ascii").lower()
        except UnicodeEncodeError:  # in an IPv6 address, which nothing else looks at
            host = ""
        if len(host) > 253 or not (_NAME.fullmatch(host) or _IPV6.fullmatch(host)):
            raise _refusal("The URL has no valid host name.")
        port = _PORTS[url.scheme] if url.port is None else url.port
        if self._ports and port not in self._ports:
            raise _refusal(f"Port {port} may not be reached, only {', '.join(map(str, self._ports))}.")
        return Target(url.scheme, host, port)

    def check_text(self, text: str) -> Target:
        """Where a URL leads, as far as it can be told without a look-up."""
        target = self.check_url(parse(text))
        address = literal(target.host)
        if address is not None:
            self.check_addresses(target.host, [address])
        return target

    def check_addresses(self, host: str, addresses: Sequence[IPAddress]) -> None:
        """Refuse `host` unless it has addresses and every one of them is public or allowed."""
        if not addresses or not all(is_public(each) or self._is_allowed(each) for each in addresses):
            raise _refusal(REFUSED)

    def is_internal(self, addresses: Sequence[IPAddress]) -> bool:
        """Whether all addresses lie in networks that the operator allowed."""
        return all(self._is_allowed(each) for each in addresses)

    def _is_allowed(self, address: IPAddress) -> bool:
        return any(address in network for network in self._networks)


def parse(text: str) -> httpx.URL:
    """Raises AssetError for what is no URL."""
    try:
        return httpx.URL(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise _refusal("This is not a valid URL.") from error


def literal(host: str) -> IPAddress | None:
    """The address that a host is by its very name, or None: `10.1`, `0x7f000001` and `localhost` are such."""
    name = host.removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return IPv4Address("127.0.0.1")
    try:
        return ip_address(name)
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(name))
    except OSError:
        return None


def _refusal(message: str) -> AssetError:
    return AssetError(message, "file_download_error")
