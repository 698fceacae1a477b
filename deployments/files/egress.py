"""HTTP requests to hosts that callers name, each to an address that has been checked.

A URL is parsed once, its host is resolved once, every address is checked, and the connection goes
to a checked address while the Host header and the TLS name stay those of the URL. So no second
look-up can lead elsewhere. Redirects are not followed: where one leads is a new URL to find.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

import httpx

from deployments.files.guard import REFUSED, Guard, IPAddress, Target
from schemas.errors import AssetError
from schemas.settings import ReachSettings

MAX_ATTEMPTS = 4  # addresses of one host that are tried
USER_AGENT = "darkroom"

Resolver = Callable[[str, int], Awaitable[list[IPAddress]]]


async def resolve(host: str, port: int, threads: Executor | None = None) -> list[IPAddress]:
    """The system's answer for a host, in its order of preference. Raises OSError or UnicodeError.

    A name server that is silent keeps one of `threads` for long after the caller has given up; without
    any of one's own it is one of the few that the whole process shares.
    """
    ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(threads, ask)
    return list(dict.fromkeys(ip_address(sockaddr[0]) for *_, sockaddr in found))


@dataclass(frozen=True, slots=True)
class Place:
    """A URL that may be asked for, and the checked addresses behind it."""

    url: httpx.URL
    target: Target
    addresses: tuple[IPAddress, ...]
    is_internal: bool  # all of them lie in networks that the operator allowed


class Egress:
    """Proxy variables are ignored; SSL_CERT_FILE and SSL_CERT_DIR may name the operator's own authorities."""

    def __init__(
        self,
        settings: ReachSettings,
        resolver: Resolver = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._guard = Guard(settings)
        self._connect_timeout_s = settings.connect_timeout_s
        self._resolver = resolver
        self._tls = tls or httpx.create_ssl_context()

    async def find(self, url: httpx.URL) -> Place:
        """Look a URL's host up and check it. Raises AssetError for what may not be reached."""
        target = self._guard.check_url(url)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                addresses = await self._resolver(target.host, target.port)
        except (OSError, UnicodeError) as error:  # among them TimeoutError
            raise AssetError(REFUSED, "file_download_error") from error
        self._guard.check_addresses(target.host, addresses)
        return Place(url, target, tuple(addresses), self._guard.is_internal(addresses))

    @asynccontextmanager
    async def ask(
        self,
        place: Place,
        method: str,
        headers: Mapping[str, str],
        silence_s: float,
        content: bytes | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """One request on a connection of its own, so that no host speaks in the name of another.

        The body of the answer is still to be read; a host that sends nothing for `silence_s` is given up.
        Raises httpx.TransportError.
        """
        async with httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
            response = await self._connect(transport, place, method, headers, silence_s, content)
            try:
                yield response
            finally:
                await response.aclose()

    async def _connect(
        self,
        transport: httpx.AsyncHTTPTransport,
        place: Place,
        method: str,
        headers: Mapping[str, str],
        silence_s: float,
        content: bytes | None,
    ) -> httpx.Response:
        """Ask the first of the checked addresses that takes the connection."""
        failure: httpx.TransportError | None = None
        for address in place.addresses[:MAX_ATTEMPTS]:
            try:
                return await transport.handle_async_request(
                    httpx.Request(
                        method,
                        place.url.copy_with(host=str(address), port=place.target.port),
                        headers={
                            "Host": place.url.netloc.decode("ascii"),
                            **headers,
                            "User-Agent": USER_AGENT,
                        },
                        content=content,
                        extensions={
                            "sni_hostname": place.target.host,
                            "timeout": {"connect": self._connect_timeout_s, "read": silence_s},
                        },
                    )
                )
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        assert failure is not None, "the guard refuses a host without addresses"
        raise failure
