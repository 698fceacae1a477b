"""Fetching what a request names, from real sockets."""

import asyncio
import base64
import datetime
import gzip
import hashlib
import io
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from deployments.files.fetch import Downloaded, Fetcher, decode_data_uri, own_key
from deployments.files.guard import REFUSED, IPAddress
from deployments.files.store import FileStore, open_files
from schemas.errors import AssetError
from schemas.settings import FetchSettings
from tests.corpus.inside import SPELLINGS

BASE = "http://box:8000"
BODY = b"a picture"
Piece = bytes | float  # bytes to send, or seconds to wait

_connects: list[Any] | None = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect" and _connects is not None:
        _connects.append(args[1])


sys.addaudithook(_note)


@pytest.fixture
def connects() -> Iterator[list[Any]]:
    """Every address that this process connects to during the test."""
    global _connects
    _connects = []
    yield _connects
    _connects = None


def ok(body: bytes, *headers: str) -> list[Piece]:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return ["\r\n".join(lines).encode("latin-1") + body]


def redirect(location: str, status: int = 302) -> list[Piece]:
    return [f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")]


class Site:
    """A server whose every answer is written out, byte by byte."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Piece]] = {}
        self.heads: list[str] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.heads.append(head)
            for piece in self.answers.get(head.split()[1], [b"HTTP/1.1 404 Not Found\r\n\r\n"]):
                if isinstance(piece, float):
                    await asyncio.sleep(piece)
                else:
                    writer.write(piece)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


async def _site(tls: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    site = Site()
    server = await asyncio.start_server(site.serve, "127.0.0.1", 0, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    async with server:
        yield site


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async for each in _site():
        yield each


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return open_files(f"file://{tmp_path}/files")


class Names:
    """A resolver with answers of our own; each call takes a host's next answer, the last one stays."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[IPAddress]:
        self.asked.append(host)
        known = self.answers.get(host.split(".")[0])
        if known is None:
            raise OSError("no such host")
        return [ip_address(each) for each in (known.pop(0) if len(known) > 1 else known[0])]


def settings(**changes: Any) -> FetchSettings:
    return FetchSettings(**{"allowed_networks": ("127.0.0.0/8",), "allowed_ports": ()} | changes)


async def fails(fetcher: Fetcher, source: str, *words: str, kind: str = "file_download_error") -> AssetError:
    with pytest.raises(AssetError) as failed:
        await fetcher.image(source, BASE)
    assert failed.value.kind == kind
    for word in words:
        assert word in failed.value.message
    return failed.value


# -- what can be had


async def test_an_image_is_fetched(files: FileStore, site: Site) -> None:
    site.answers["/cat.png?size=2"] = ok(BODY)
    assert await Fetcher(files, settings()).image(site.url("/cat.png?size=2#top"), BASE) == BODY


async def test_t09_a_request_says_nothing_of_us(
    files: FileStore, site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    site.answers["/a"] = [redirect("/b")[0].replace(b"Content", b"Set-Cookie: a=b\r\nContent", 1)]  # type: ignore[union-attr]
    site.answers["/b"] = ok(BODY)
    await Fetcher(files, settings()).image(site.url("/a"), BASE)
    for head in site.heads:
        names = [line.split(":")[0].lower() for line in head.splitlines()[1:] if line]
        assert names == ["host", "accept", "accept-encoding", "user-agent"]
        assert f"Host: 127.0.0.1:{site.port}\r\n" in head


async def test_a_download_is_counted_hashed_and_reported(files: FileStore, site: Site) -> None:
    body = bytes(range(256)) * 4096
    site.answers["/x"] = ok(body, 'ETag: "one"')
    sink = io.BytesIO()
    told: list[tuple[int, int | None]] = []
    done = await Fetcher(files, settings()).download(
        site.url("/x"), sink, 2**20, 5, lambda count, total: told.append((count, total))
    )
    assert done == Downloaded(len(body), hashlib.sha256(body).hexdigest(), '"one"')
    assert sink.getvalue() == body
    assert told == [(step * 2**18, 2**20) for step in range(1, 5)]


async def test_an_unchanged_file_is_not_sent_again(files: FileStore, site: Site) -> None:
    site.answers["/x"] = [b'HTTP/1.1 304 Not Modified\r\nETag: "one"\r\n\r\n']
    fetcher = Fetcher(files, settings())
    sink = io.BytesIO()
    assert await fetcher.download(site.url("/x"), sink, 9, 5, lambda *_: None, etag='"one"') is None
    assert 'if-none-match: "one"' in site.heads[0].lower() and sink.getvalue() == b""
    await fails(fetcher, site.url("/x"), "304")  # not asked for


@pytest.mark.parametrize("tag", ['W/"weak"', "bare", '""', f'"{"x" * 300}"'])
async def test_only_strong_tags_are_kept(files: FileStore, site: Site, tag: str) -> None:
    site.answers["/x"] = ok(BODY, f"ETag: {tag}")
    done = await Fetcher(files, settings()).download(site.url("/x"), io.BytesIO(), 99, 5, lambda *_: None)
    assert done is not None and done.etag is None


# -- where a URL may lead


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_t08_no_spelling_leads_inside(
    files: FileStore, site: Site, connects: list[Any], spelling: str
) -> None:
    closed = Fetcher(files, settings(allowed_networks=()))
    await fails(closed, f"http://{spelling}:{site.port}/")
    await fails(closed, f"https://{spelling}/")
    assert connects == [] and site.heads == []


async def test_t25_refusals_do_not_tell_hosts_apart(files: FileStore, connects: list[Any]) -> None:
    names = Names(inside=[["10.0.0.1"]], metadata=[["169.254.169.254"]], none=[[]])
    closed = Fetcher(files, settings(allowed_networks=()), names)
    texts = {
        (await fails(closed, f"http://{host}/")).message
        for host in ("inside", "metadata", "none", "unknown", "inside.example")
    }
    assert texts == {REFUSED} and connects == []


@pytest.mark.parametrize(
    "answer",
    [
        ["8.8.8.8", "10.0.0.1"],
        ["10.0.0.1", "8.8.8.8"],
        ["8.8.8.8", "::1"],
        ["2606:4700::1111", "::ffff:8.8.8.8"],
    ],
)
async def test_t07_one_internal_answer_among_public_ones_is_refused(
    files: FileStore, connects: list[Any], answer: list[str]
) -> None:
    names = Names(mixed=[answer])
    await fails(Fetcher(files, settings(), names), "https://mixed.example/", REFUSED)
    assert names.asked == ["mixed.example"] and connects == []


async def test_t07_a_host_is_resolved_once_and_connected_to_where_it_was_checked(
    files: FileStore, site: Site, connects: list[Any]
) -> None:
    names = Names(rebind=[["127.0.0.1"], ["10.0.0.1"]])  # a second look would be refused
    site.answers["/x"] = ok(BODY)
    fetcher = Fetcher(files, settings(), names)
    assert await fetcher.image(site.url("/x", "rebind.example"), BASE) == BODY
    assert names.asked == ["rebind.example"]
    assert connects == [("127.0.0.1", site.port)]
    assert f"Host: rebind.example:{site.port}\r\n" in site.heads[0]
    await fails(fetcher, site.url("/x", "rebind.example"), REFUSED)
    assert len(site.heads) == 1


async def test_the_next_address_is_tried(files: FileStore, site: Site) -> None:
    site.answers["/x"] = ok(BODY)
    names = Names(two=[["127.0.0.9", "127.0.0.1"]])  # nobody listens on the first
    assert await Fetcher(files, settings(), names).image(site.url("/x", "two"), BASE) == BODY


async def test_a_resolver_that_hangs_is_given_up(files: FileStore) -> None:
    async def hang(host: str, port: int) -> list[IPAddress]:
        await asyncio.sleep(30)
        return []

    await fails(Fetcher(files, settings(connect_timeout_s=0.05), hang), "http://slow/", REFUSED)


# -- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_followed_on_a_new_connection(
    files: FileStore, site: Site, connects: list[Any], status: int
) -> None:
    names = Names(one=[["127.0.0.1"]], two=[["127.0.0.1"]])
    site.answers["/a"] = redirect(site.url("/b", "two"), status)
    site.answers["/b"] = redirect("c")
    site.answers["/c"] = ok(BODY)
    assert await Fetcher(files, settings(), names).image(site.url("/a", "one"), BASE) == BODY
    assert names.asked == ["one", "two", "two"] and len(connects) == 3


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("http://10.0.0.1/", REFUSED),
        ("http://169.254.169.254/latest/meta-data", REFUSED),
        ("http://[::1]/", REFUSED),
        ("//192.168.0.1/x", REFUSED),
        ("http://2852039166/", REFUSED),
        ("http://unknown/", REFUSED),
        ("file:///etc/passwd", "Only http and https"),
        ("gopher://one/", "Only http and https"),
        ("data:text/plain,x", "Only http and https"),
        ("http://me:secret@one/", "user name"),
        ("http://[::1", "not a valid URL"),
        ("http://one:port/", "not a valid URL"),
        ("/a", "more than 3 times"),  # a loop
        ("", "without saying where"),
    ],
)
async def test_t06_a_redirect_is_checked_as_any_url(
    files: FileStore, site: Site, connects: list[Any], location: str, why: str
) -> None:
    site.answers["/a"] = redirect(location)

    async def resolve(host: str, port: int) -> list[IPAddress]:
        numbers = {"one": "127.0.0.1", "2852039166": "169.254.169.254"}
        if host == "unknown":
            raise OSError("no such host")
        return [ip_address(numbers.get(host, host))]

    await fails(Fetcher(files, settings(), resolve), site.url("/a", "one"), why)
    assert len(connects) == (4 if location == "/a" else 1)


async def test_t06_three_redirects_are_the_most(files: FileStore, site: Site) -> None:
    for step in range(4):
        site.answers[f"/{step}"] = redirect(f"/{step + 1}")
    site.answers["/4"] = ok(BODY)
    fetcher = Fetcher(files, settings())
    assert await fetcher.image(site.url("/1"), BASE) == BODY
    await fails(fetcher, site.url("/0"), "more than 3 times")
    await fails(Fetcher(files, settings(max_redirects=0)), site.url("/3"), "more than 0 times")


def certificate(name: str, folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS for a server of that name, and for a client that trusts it."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(pem)
    return server, ssl.create_default_context(cadata=signed.public_bytes(serialization.Encoding.PEM).decode())


async def test_t07_tls_is_verified_for_the_name_in_the_url(files: FileStore, tmp_path: Path) -> None:
    serving, trusting = certificate("box.example", tmp_path)
    names = Names(box=[["127.0.0.1"]], other=[["127.0.0.1"]])
    async for site in _site(serving):
        site.answers["/x"] = ok(BODY)
        site.answers["/down"] = redirect(site.url("/x", "box.example"))
        fetcher = Fetcher(files, settings(), names, trusting)
        assert await fetcher.image(site.url("/x", "box.example", "https"), BASE) == BODY
        await fails(fetcher, site.url("/down", "box.example", "https"), "from https to http")
        assert len(site.heads) == 2
        await fails(fetcher, site.url("/x", "other.example", "https"), "No connection")
        await fails(fetcher, site.url("/x", "127.0.0.1", "https"), REFUSED)  # not a name of this resolver
        await fails(
            Fetcher(files, settings(), names), site.url("/x", "box.example", "https"), "No connection"
        )
        assert len(site.heads) == 2


async def test_plain_http_can_be_kept_inside(files: FileStore, site: Site, connects: list[Any]) -> None:
    names = Names(inside=[["127.0.0.1"]], outside=[["8.8.8.8"]])
    site.answers["/x"] = ok(BODY)
    site.answers["/out"] = redirect("http://outside/x")
    fetcher = Fetcher(files, settings(), names)

    async def get(url: str) -> None:
        await fetcher.download(url, io.BytesIO(), 99, 5, lambda *_: None, internal_http=True)

    await get(site.url("/x", "inside"))
    for url in ("http://outside/x", site.url("/out", "inside")):
        with pytest.raises(AssetError, match="use https"):
            await get(url)
    assert {address for address, _ in connects} == {"127.0.0.1"}


# -- what a server may answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\nsecret"], "answered 404"),
        ([b"HTTP/1.1 500 Oh\r\n\r\nsecret"], "answered 500"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], "answered 204"),
        ([b"HTTP/1.1 206 Partial\r\nContent-Length: 1\r\n\r\nx"], "answered 206"),
        ([b"HTTP/1.1 300 Choose\r\nLocation: /y\r\n\r\n"], "answered 300"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"], "broke before"),  # truncated
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel"], "broke before"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx"], "broke before"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy"], "broke before"),
        ([b"no HTTP at all\r\n\r\n"], "broke before"),
        ([], "broke before"),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000 + b"\r\n\r\n"], "broke before"),
        (ok(gzip.compress(bytes(2**20)), "Content-Encoding: gzip"), "compressed"),  # 1 MB in 1 kB
        (ok(BODY, "Content-Encoding: br"), "compressed"),
        (ok(BODY, "Content-Encoding: identity, gzip"), "compressed"),
    ],
)
async def test_other_answers_are_refused(
    files: FileStore, site: Site, answer: list[Piece], words: str
) -> None:
    site.answers["/x"] = answer
    failed = await fails(Fetcher(files, settings(max_image_bytes=5000)), site.url("/x"), words)
    assert "secret" not in failed.message


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"x" * 101),
        [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nx", 30.0],  # a lie, refused at its word
        [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 2**18] * 40],  # unannounced
        [
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            *[b"3e8\r\n" + b"x" * 1000 + b"\r\n"] * 999,
        ],
    ],
)
async def test_t19_a_file_above_the_limit_is_refused(
    files: FileStore, site: Site, answer: list[Piece]
) -> None:
    site.answers["/x"] = answer
    fetcher = Fetcher(files, settings(max_image_bytes=100))
    failed = await fails(fetcher, site.url("/x"), "100 bytes", kind="file_too_large")
    assert failed.ctx == {"max_size": 100}


async def test_a_file_of_just_the_limit_is_taken(files: FileStore, site: Site) -> None:
    site.answers["/x"] = ok(b"x" * 100)
    assert len(await Fetcher(files, settings(max_image_bytes=100)).image(site.url("/x"), BASE)) == 100


@pytest.mark.parametrize(
    "answer",
    [
        [30.0],  # says nothing
        [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", *[b"x", 0.02] * 99],  # a drop at a time
        [*[b"HTTP/1.1 200 OK\r\n"], *[b"X: x\r\n", 0.02] * 99],
    ],
)
async def test_t18_a_slow_server_is_given_up(files: FileStore, site: Site, answer: list[Piece]) -> None:
    site.answers["/x"] = answer
    await fails(Fetcher(files, settings(image_timeout_s=0.15)), site.url("/x"), "longer than 0.15 seconds")


async def test_a_closed_port_is_no_connection(files: FileStore) -> None:
    await fails(Fetcher(files, settings()), "http://127.0.0.1:1/", "No connection")


@pytest.mark.parametrize(
    "source",
    ["", "cat.png", "/etc/passwd", "C:\\cat.png", "http://[::1", "\0", "x" * 99_999, "http://x/\ud800"],
)
async def test_what_is_no_url_is_refused(files: FileStore, connects: list[Any], source: str) -> None:
    await fails(Fetcher(files, settings()), source)
    assert connects == []


# -- the server's own files


async def test_t09_own_files_are_read_without_http(files: FileStore, connects: list[Any]) -> None:
    key = await files.save(BODY, "image/png")
    fetcher = Fetcher(files, settings(allowed_networks=()))
    for url in (f"{BASE}/files/{key}", f"https://BOX/files/{key}?x=1", f"http://box:9/files/{key}"):
        assert await fetcher.image(url, BASE) == BODY
    await fails(fetcher, f"{BASE}/files/{'0' * 32}.png", "no such file")
    await fails(fetcher, f"{BASE}/files/cat.png", "no such file")
    too_small = Fetcher(files, settings(max_image_bytes=3))
    await fails(too_small, f"{BASE}/files/{key}", kind="file_too_large")
    assert connects == []


async def test_an_own_file_is_known_under_any_name_of_the_host(
    files: FileStore, site: Site, connects: list[Any]
) -> None:
    key = await files.save(BODY, "image/png")
    fetcher = Fetcher(files, settings(allowed_networks=()))
    for place in ("http://localhost:8000", "https://pictures.example/darkroom", "http://169.254.169.254"):
        assert await fetcher.image(f"{place}/files/{key}?x=1", BASE) == BODY
        assert await fetcher.image(f"{place}/files/{key}", "") == BODY
    assert connects == []


async def test_another_server_of_this_kind_is_asked_for_its_own_files(files: FileStore, site: Site) -> None:
    path = f"/files/{'0' * 32}.png"
    site.answers[path] = ok(b"theirs")
    assert await Fetcher(files, settings()).image(site.url(path), BASE) == b"theirs"


@pytest.mark.parametrize(
    ("source", "base_url", "key"),
    [
        ("http://box/files/k.png", "http://box", "k.png"),
        ("https://box:1/a/files/k.png", "http://box/a", "k.png"),
        ("http://box/files/k.png", "http://box/a/", "k.png"),
        ("http://box/files/a%2fb", "http://box", None),
        ("http://box/files/../k", "http://box", None),
        ("http://box/other/files/k", "http://box", None),
        ("http://me@box/files/k", "http://box", None),
        ("http://other/files/k", "http://box", None),
        ("http://box.example/files/k", "http://box", None),
        ("ftp://box/files/k", "http://box", None),
        ("/files/k", "http://box", None),
        ("/files/k", "", None),
        ("http://[::1", "http://box", None),
        ("http://xn--127.0.0.1/files/k", "http://box", None),  # a host that cannot be written out
        ("http://box/files/k", "http://xn--127.0.0.1", None),
    ],
)
def test_t09_an_own_file_is_known_by_host_and_path(source: str, base_url: str, key: str | None) -> None:
    assert own_key(source, base_url) == key


# -- configs


async def test_a_config_is_a_json_object_from_anywhere(files: FileStore, site: Site) -> None:
    config = b'{"num_layers": 5}'
    site.answers["/config.json"] = ok(config)
    key = await files.save(config, "image/png")  # its content counts, not its name
    fetcher = Fetcher(files, settings())
    inline = f"data:application/json;base64,{base64.b64encode(config).decode()}"
    for source in (site.url("/config.json"), f"{BASE}/files/{key}", inline):
        assert await fetcher.config(source, BASE) == config


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<!doctype html><html>", "this is no JSON"),
        (b"", "this is no JSON"),
        (b'{"a": 1', "this is no JSON"),
        (b'{"a": NaN}', "this is no JSON"),
        (b'{"a": "\xff"}', "this is no JSON"),
        (b"[" * 50_000 + b"]" * 50_000, "this is no JSON"),  # deeper than anyone reads
        (b"[]", "another JSON value"),
        (b"null", "another JSON value"),
    ],
)
async def test_what_is_no_config_is_refused(files: FileStore, site: Site, body: bytes, why: str) -> None:
    site.answers["/x"] = ok(body)
    with pytest.raises(AssetError, match=f"must be a JSON object.*{why}") as failed:
        await Fetcher(files, settings(max_config_bytes=200_000)).config(site.url("/x"), BASE)
    assert failed.value.kind == "file_download_error"


async def test_a_config_has_a_limit_of_its_own(files: FileStore, site: Site) -> None:
    body = b"{" + b" " * 64 + b"}"
    site.answers["/x"] = ok(body)
    for source in (site.url("/x"), f"data:,{body.decode()}"):
        assert await Fetcher(files, settings(max_config_bytes=66)).config(source, BASE) == body
        with pytest.raises(AssetError) as failed:
            await Fetcher(files, settings(max_config_bytes=65)).config(source, BASE)
        assert (failed.value.kind, failed.value.ctx) == ("file_too_large", {"max_size": 65})


# -- data URIs

ALL_BYTES = bytes(range(256))


@pytest.mark.parametrize(
    ("uri", "data"),
    [
        (f"data:image/png;base64,{base64.b64encode(ALL_BYTES).decode()}", ALL_BYTES),
        (f"DATA:image/png;BASE64,{base64.b64encode(ALL_BYTES).decode()}", ALL_BYTES),
        (f"data:image/png;charset=utf-8;base64,{base64.b64encode(ALL_BYTES).decode()}", ALL_BYTES),
        (f"data:image/png;name=a.png; base64,{base64.b64encode(ALL_BYTES).decode()}", ALL_BYTES),
        (f"data:;base64,{base64.b64encode(ALL_BYTES).decode()}", ALL_BYTES),
        (f"data:image/png;base64,{quote(base64.b64encode(ALL_BYTES).decode(), safe='')}", ALL_BYTES),
        (f"data:image/png,{quote(ALL_BYTES)}", ALL_BYTES),
        (f"data:image/png;charset=utf-8,{quote(ALL_BYTES)}", ALL_BYTES),
        (f"data:image/png,{''.join(f'%{each:02X}' for each in ALL_BYTES)}", ALL_BYTES),
        ("data:,a=b==c%3D%0A=%0D%0A_ %20", b"a=b==c=\n=\r\n_  "),
        ("data:,A%20brief,note", b"A brief,note"),
        ("data:application/octet-stream;base64,QQ==", b"A"),
        ("data:text/html;base64,QUI=", b"AB"),  # the type is the sender's word: content decides elsewhere
        ("data:base64,QQ==", b"A"),  # its semicolon forgotten
        ("data:,", b""),
        ("data:;base64,", b""),
    ],
)
def test_a_data_uri_is_read(uri: str, data: bytes) -> None:
    assert decode_data_uri(uri, 1000) == data


@pytest.mark.parametrize(
    "uri",
    [
        "data:",
        "data:image/png;base64",
        f"data:{'a' * 2000},QQ==",
        "data:;base64,Q",
        "data:;base64,QQ",  # no padding
        "data:;base64,QQ=",
        "data:;base64,QQ==QQ==",
        "data:;base64,=QQQ",
        "data:;base64,QQ==\n",
        "data:;base64,Q Q==",
        "data:;base64,Q!Q==",
        "data:;base64,-_==",  # another alphabet
        "data:;base64,ＱＱ==",
        "data:;base64,%zz",
        "data:;base64,data:;base64,QQ==",
        "data:,%",
        "data:,%4",
        "data:,%g1",
        "data:,%%41",
        "data:,é",
        "data:,\ud800",
    ],
)
def test_a_damaged_data_uri_is_refused(uri: str) -> None:
    with pytest.raises(AssetError) as failed:
        decode_data_uri(uri, 1000)
    assert failed.value.kind == "file_download_error"


@pytest.mark.parametrize(
    ("uri", "is_taken"),
    [
        (f"data:;base64,{base64.b64encode(bytes(100)).decode()}", True),
        (f"data:;base64,{base64.b64encode(bytes(101)).decode()}", False),
        (f"data:;base64,{'A' * 9999}!", False),  # too long to be looked at
        (f"data:,{'%41' * 100}", True),
        (f"data:,{'%41' * 101}", False),
        (f"data:,{'a' * 101}", False),
    ],
)
async def test_data_uris_have_the_limit_of_images(files: FileStore, uri: str, is_taken: bool) -> None:
    fetcher = Fetcher(files, settings(max_image_bytes=100))
    if is_taken:
        assert len(await fetcher.image(uri, BASE)) == 100
    else:
        assert (await fails(fetcher, uri, kind="file_too_large")).ctx == {"max_size": 100}
