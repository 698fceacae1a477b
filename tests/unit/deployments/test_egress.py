"""Requests to hosts that callers name, as far as downloads do not show it."""

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

import httpx
import pytest

from deployments.files.egress import Egress, resolve
from deployments.files.guard import REFUSED, IPAddress
from schemas.errors import AssetError
from schemas.settings import WebhookSettings


async def public(host: str, port: int) -> list[IPAddress]:
    return [ip_address("8.8.8.8"), ip_address("10.0.0.1" if "mixed" in host else "1.1.1.1")]


async def test_a_place_is_what_was_checked() -> None:
    place = await Egress(WebhookSettings(), public).find(httpx.URL("https://example.com/hook"))
    assert place.target.host == "example.com"
    assert [str(address) for address in place.addresses] == ["8.8.8.8", "1.1.1.1"]
    assert not place.is_internal


@pytest.mark.parametrize("url", ["https://mixed.example/", "https://10.0.0.1/", "http://[::1]/"])
async def test_what_leads_inside_is_not_found(url: str) -> None:
    async def literal(host: str, port: int) -> list[IPAddress]:
        return await public(host, port) if "mixed" in host else [ip_address(host)]

    with pytest.raises(AssetError, match=REFUSED):
        await Egress(WebhookSettings(), literal).find(httpx.URL(url))


async def test_names_that_hang_take_only_their_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    answered, gate = socket.getaddrinfo, threading.Event()

    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> Any:
        if host == "hangs.example":
            gate.wait(60)
        return answered("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with ThreadPoolExecutor(40) as threads:
        stuck = [asyncio.ensure_future(resolve("hangs.example", 80, threads)) for _ in range(39)]
        assert await resolve("quick.example", 80, threads) == [ip_address("127.0.0.1")]
        assert await resolve("quick.example", 80) == [ip_address("127.0.0.1")]
        assert not any(each.done() for each in stuck)
        gate.set()
        await asyncio.gather(*stuck)
