"""Which addresses and URLs a request may reach."""

from ipaddress import ip_address, ip_network

import httpx
import pytest

from deployments.files.guard import REFUSED, Guard, Target, is_public, literal
from schemas.errors import AssetError
from schemas.settings import FetchSettings
from tests.corpus.inside import DISPUTED, NOT_PUBLIC, SPELLINGS

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",  # the neighbours of blocks
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "168.63.129.15",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.0",
    "192.167.255.255",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2000::1",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2003::1",
    "2606:4700::1111",
    "2a00:1450::5efe:808:808",  # ISATAP of a public address
    "3ffe:ffff::1",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_t08_a_special_address_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_t08_an_ordinary_address_is_public(address: str) -> None:
    assert is_public(ip_address(address))


def guard(*networks: str, ports: tuple[int, ...] = (80, 443)) -> Guard:
    return Guard(FetchSettings(allowed_networks=networks, allowed_ports=ports))


def test_t07_one_bad_answer_refuses_the_host() -> None:
    for answers in (["8.8.8.8", "10.0.0.1"], ["10.0.0.1", "8.8.8.8"], ["10.0.0.1"], []):
        with pytest.raises(AssetError) as refused:
            guard().check_addresses("x", [ip_address(each) for each in answers])
        assert (refused.value.message, refused.value.kind) == (REFUSED, "file_download_error")
    guard().check_addresses("x", [ip_address("8.8.8.8"), ip_address("2606:4700::1111")])


def test_the_operator_opens_networks() -> None:
    opened = guard("10.0.0.0/8", "fd00::/8")
    inside = [ip_address("10.1.2.3"), ip_address("fd00::1")]
    opened.check_addresses("x", [*inside, ip_address("8.8.8.8")])
    assert opened.is_internal(inside)
    assert not opened.is_internal([*inside, ip_address("8.8.8.8")])
    for other in ("192.168.0.1", "::ffff:10.1.2.3", "64:ff9b::a01:203"):
        with pytest.raises(AssetError):
            opened.check_addresses("x", [ip_address(other)])


def test_a_network_that_is_none_stops_the_start() -> None:
    with pytest.raises(ValueError, match="host bits"):
        guard("10.0.0.1/8")


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://Example.com/x", Target("http", "example.com", 80)),
        ("HTTPS://example.com:443/x", Target("https", "example.com", 443)),
        ("http://example.com:443", Target("http", "example.com", 443)),
        ("https://bücher.example", Target("https", "xn--bcher-kva.example", 443)),
        ("https://my_bucket.example.", Target("https", "my_bucket.example.", 443)),
        ("http://[2606:4700::1111]/", Target("http", "2606:4700::1111", 80)),
        ("http://127。0。0。1/", Target("http", "127.0.0.1", 80)),  # seen as what it connects to
    ],
)
def test_t08_a_url_leads_to_one_target(url: str, target: Target) -> None:
    assert guard().check_url(httpx.URL(url)) == target


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://example.com/", "Only http and https"),
        ("file:///etc/passwd", "Only http and https"),
        ("gopher://127.0.0.1:70/", "Only http and https"),
        ("//example.com/x", "Only http and https"),
        ("example.com/x", "Only http and https"),
        ("http:///x", "no valid host"),
        ("http:x", "no valid host"),
        ("http://user:word@example.com/", "user name"),
        ("http://user@example.com/", "user name"),
        ("http://example.com:22/", "Port 22"),
        ("http://example.com:0/", "Port 0"),
        ("http://example.com:99999/", "Port 99999"),
        ("http://exa mple.com/", "no valid host"),
        ("http://a%2fb/", "no valid host"),
        ("http://127.0.0.1%00/", "no valid host"),
        ("http://a\\b/", "no valid host"),
        ("http://a..b/", "no valid host"),
        ("http://.a/", "no valid host"),
        ("http://[fe80::1%25lo]/", "no valid host"),
        (f"http://{'a.' * 127}b/", "no valid host"),
    ],
)
def test_t08_other_urls_are_refused(url: str, why: str) -> None:
    with pytest.raises(AssetError, match=why) as refused:
        guard().check_url(httpx.URL(url))
    assert refused.value.kind == "file_download_error"


def test_no_list_of_ports_means_any_port() -> None:
    assert guard(ports=()).check_url(httpx.URL("http://example.com:9000/")).port == 9000


def test_the_tables_say_what_they_mean() -> None:
    assert len(set(NOT_PUBLIC)) >= 55 and len(set(SPELLINGS)) >= 37 and len(set(DISPUTED)) >= 45
    assert not any(ip_address(each.split("%")[0]) in ip_network("2606:4700::/32") for each in NOT_PUBLIC)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("8.8.8.8", "8.8.8.8"),
        ("8.8.8.8.", "8.8.8.8"),
        ("2606:4700::1111", "2606:4700::1111"),
        ("10.1", "10.0.0.1"),  # what resolvers take such forms for
        ("0x7f000001", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("app.localhost.", "127.0.0.1"),
        ("example.com", None),
        ("localhost.example.com", None),
        ("1.2.3.4.5", None),
        ("deadbeef", None),
    ],
)
def test_t08_a_host_that_is_an_address_is_seen_without_a_look_up(host: str, address: str | None) -> None:
    assert literal(host) == (None if address is None else ip_address(address))


def test_a_text_is_checked_as_far_as_it_goes() -> None:
    assert guard().check_text("https://example.com/hook?a=b") == Target("https", "example.com", 443)
    assert guard("127.0.0.0/8").check_text("http://localhost/").host == "localhost"
    for text in (
        "http://localhost/",
        "http://10.0.0.1/",
        "http://[::1",
        "http://a\nb/",
        "http://2130706433/",
    ):
        with pytest.raises(AssetError):
            guard().check_text(text)
