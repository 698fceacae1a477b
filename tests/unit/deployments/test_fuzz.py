"""Parsers of what strangers send, on bytes that are nearly right: they answer, or refuse in fal's words."""

import asyncio
from ipaddress import ip_address

import pytest
from hypothesis import given

from deployments.files.egress import Egress
from deployments.files.fetch import own_key
from deployments.files.guard import Guard, IPAddress, is_public, literal, parse
from deployments.gateway.keys import Keys
from deployments.gateway.keys import parse as parse_keys
from deployments.gateway.throttle import Throttle
from schemas.errors import AssetError, NotAuthenticated
from schemas.settings import FetchSettings
from tests.support.fuzzing import fuzzed, mutants, seeds

KEYS = Keys(parse_keys("alice:s3cret"), throttle=Throttle(10**9))


@pytest.mark.parametrize("target", ["auth_header", "url", "multipart"])
def test_there_is_a_corpus(target: str) -> None:
    assert len(set(seeds(target))) >= 10


@fuzzed
@given(mutants("auth_header"))
def test_no_authorization_header_does_any_harm(header: bytes) -> None:
    text = header.decode("latin-1")
    try:
        assert asyncio.run(KEYS.actor([text])).tenant == "alice"
    except NotAuthenticated:
        return
    assert "alice:s3cret" in text or "YWxpY2U6czNjcmV0" in text


@fuzzed
@given(mutants("url"))
def test_t08_no_url_does_any_harm(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    connected: list[IPAddress] = []

    async def resolver(host: str, port: int) -> list[IPAddress]:
        connected.append(literal(host) or ip_address("8.8.8.8"))
        return connected[-1:]

    own_key(text, "http://box")
    own_key("http://box/files/x", text)
    try:
        Guard(FetchSettings()).check_text(text)
        place = asyncio.run(Egress(FetchSettings(), resolver).find(parse(text)))
    except AssetError:
        return
    assert list(place.addresses) == connected and all(map(is_public, connected))
