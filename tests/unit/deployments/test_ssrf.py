"""No URL that a request can hold leads inside: every field of every endpoint, straight and by redirects.

What is fetched is fetched as a worker does it: images and configs by the Fetcher, weights by Weights, and
webhooks as gateway and sender do it. A redirecting site stands at the one address that may be reached.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from pydantic import BaseModel

from deployments.files.egress import Egress
from deployments.files.fetch import Fetcher
from deployments.files.guard import Guard, IPAddress, literal
from deployments.files.store import FileStore, open_files
from deployments.files.weights import Weights
from pipelines.registry import ENDPOINTS
from schemas.assets import Asset, AssetKind, Names
from schemas.errors import AssetError
from schemas.settings import FetchSettings, ModelSettings, WebhookSettings, WeightSettings
from tests.corpus.inside import NOT_PUBLIC, SPELLINGS, inputs, url_of
from tests.support.audit import Seen, watching
from tests.unit.deployments.places import BASE, safetensors

HERE = "127.9.9.9"  # all that may be reached
STATUSES = (301, 302, 303, 307, 308)
INSIDE = inputs()
PLAIN = [url_of(each) for each in (*NOT_PUBLIC, *SPELLINGS)]


@dataclass(frozen=True)
class UrlField:
    """A field of an endpoint that names a file."""

    endpoint: str
    path: str
    kind: AssetKind


def fields() -> list[UrlField]:
    return [
        UrlField(known.stem, path, mark.kind)
        for known in ENDPOINTS.values()
        for path, mark in _marks(known.input_type())
    ]


def _marks(kind: type[BaseModel], path: str = "") -> Iterator[tuple[str, Names]]:
    for name, info in kind.model_fields.items():
        yield from ((f"{path}{name}", mark) for mark in info.metadata if isinstance(mark, Names))
        yield from _inside(info.annotation, f"{path}{name}")


def _inside(annotation: Any, path: str) -> Iterator[tuple[str, Names]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from _marks(annotation, f"{path}.")
    yield from ((path, mark) for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Names))
    for part in get_args(annotation):
        yield from _inside(part, path)


FIELDS = fields()
FETCHED = [each for each in FIELDS if each.kind is not AssetKind.FACE_ANALYSIS]  # a name, never a URL
KINDS = sorted({each.kind for each in FETCHED}, key=lambda kind: kind.value)


class Site:
    """Redirects `/STATUS/NUMBER` to an input, and a little else. Counts its connections."""

    def __init__(self) -> None:
        self.accepted = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        head = await reader.readuntil(b"\r\n\r\n")
        status, body, location = self._answer(head.split()[1].decode().split("/")[1:])
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n".encode())
        writer.write(
            b"Location: " + location.encode("utf-8", "surrogateescape") + b"\r\n" if location else b""
        )
        writer.write(b"\r\n" + body)
        writer.close()

    def _answer(self, path: list[str]) -> tuple[int, bytes, str]:
        match path:
            case ["loop"]:
                return 302, b"", "/loop"
            case ["hops", left]:
                return (302, b"", f"/hops/{int(left) - 1}") if left != "0" else (200, safetensors(3), "")
            case ["page"]:
                text = f'<meta http-equiv="refresh" content="0; url=http://127.0.0.1:{self.port}/hops/0">'
                return 200, text.encode(), ""
            case [status, number] if number.isdecimal():
                return int(status), b"", INSIDE[int(number)]
        return 404, b"", ""

    def url(self, path: str, host: str = HERE) -> str:
        return f"http://{host}:{self.port}/{path}"


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    server = await asyncio.start_server(site.serve, HERE, 0)
    site.port = server.sockets[0].getsockname()[1]
    async with server:
        yield site


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return open_files(f"file://{tmp_path}/files")


async def names(host: str, port: int) -> list[IPAddress]:
    """A resolver: numbers in any spelling are what they are, names lead to the one open address."""
    address = literal(host)
    return [ip_address(HERE) if address is None else address]


class Worker:
    """How a worker gets what requests name."""

    def __init__(self, folder: Path, files: FileStore, **reach: Any) -> None:
        fetch = FetchSettings.model_validate(
            {"allowed_networks": (f"{HERE}/32",), "allowed_ports": (), "connect_timeout_s": 5} | reach
        )
        weights = WeightSettings(cache=f"file://{folder}/cache", hub=False)
        settings = ModelSettings(model="unused", endpoints=("unused",), fetch=fetch, weights=weights)
        self.fetcher = Fetcher(files, fetch, names)
        self._weights = Weights(self.fetcher, settings, Path)

    async def get(self, kind: AssetKind, source: str) -> None:
        if kind is AssetKind.IMAGE:
            await self.fetcher.image(source, BASE)
        elif kind is AssetKind.CONFIG:
            await self.fetcher.config(source, BASE)
        else:
            (await self._weights.locate(Asset(kind, source), BASE, lambda line: None)).release()


@pytest.fixture
def worker(tmp_path: Path, files: FileStore) -> Worker:
    return Worker(tmp_path, files)


@pytest.fixture
def seen() -> Iterator[Seen]:
    with watching() as seen:
        yield seen


def test_the_fields_are_found() -> None:
    paths = {(each.endpoint, each.path) for each in FIELDS}
    assert len(paths) >= 30
    for path in ("model_name", "loras.path", "image_url", "controlnets.path", "ip_adapter.path"):
        assert ("lora_image_to_image", path) in paths
    assert ("flux_general_rf_inversion", "controlnets.config_url") in paths
    assert len(INSIDE) >= 137


@pytest.mark.parametrize("field", FETCHED, ids=lambda each: f"{each.endpoint}.{each.path}")
async def test_t05_no_field_leads_inside(field: UrlField, worker: Worker, site: Site, seen: Seen) -> None:
    for url in INSIDE:
        with pytest.raises(AssetError):
            await worker.get(field.kind, url)
    # A URL that is read as one of a name leads to what this name was checked for, and nowhere else.
    assert {address[0] for address in seen.connected} <= {HERE}
    assert site.accepted == 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
async def test_t05_no_address_in_any_spelling_is_connected_to(
    kind: AssetKind, worker: Worker, seen: Seen
) -> None:
    for url in [*PLAIN, *(url.replace("http://", "https://", 1) for url in PLAIN)]:
        with pytest.raises(AssetError):
            await worker.get(kind, url)
    assert seen.connected == []


@pytest.mark.parametrize("field", FETCHED, ids=lambda each: f"{each.endpoint}.{each.path}")
async def test_t06_no_redirect_leads_a_field_inside(
    field: UrlField, worker: Worker, site: Site, seen: Seen
) -> None:
    for number in range(len(INSIDE)):
        with pytest.raises(AssetError):
            await worker.get(field.kind, site.url(f"{STATUSES[number % 5]}/{number}"))
    assert {address[0] for address in seen.connected} == {HERE}
    assert {port for _, port, *_ in seen.connected} <= {site.port, 80, 443}


@pytest.mark.parametrize("status", STATUSES)
async def test_t06_every_kind_of_redirect_is_checked(
    status: int, worker: Worker, site: Site, seen: Seen
) -> None:
    for url in dict.fromkeys(PLAIN):
        with pytest.raises(AssetError):
            await worker.get(AssetKind.IMAGE, site.url(f"{status}/{INSIDE.index(url)}"))
    assert seen.connected == [(HERE, site.port)] * len(set(PLAIN))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
async def test_t06_loops_and_long_ways_end_after_three_redirects(
    kind: AssetKind, worker: Worker, site: Site
) -> None:
    for path in ("loop", "hops/20", "hops/4"):
        before = site.accepted
        with pytest.raises(AssetError, match="redirects more than 3 times"):
            await worker.get(kind, site.url(path))
        assert site.accepted == before + 4


async def test_t06_what_a_page_says_is_not_followed(worker: Worker, site: Site, seen: Seen) -> None:
    assert (await worker.fetcher.image(site.url("page"), BASE)).startswith(b"<meta")
    with pytest.raises(AssetError, match="web page"):
        await worker.get(AssetKind.LORA, site.url("page"))
    assert site.accepted == 2 and seen.connected == [(HERE, site.port)] * 2


@pytest.mark.parametrize(
    ("answers", "is_refused"),
    [
        ([[HERE], ["127.0.0.1"]], False),  # rebinding: a second look would lead inside
        ([["127.0.0.1"], [HERE]], True),
        ([[HERE, "127.0.0.1"]], True),  # mixed
        ([["127.0.0.1", HERE]], True),
        ([["8.8.8.8", HERE, "::1"]], True),
        ([[HERE, "::ffff:127.9.9.9"]], True),
        ([[]], True),
    ],
)
async def test_t07_a_host_is_what_its_one_resolution_said(
    answers: list[list[str]], is_refused: bool, files: FileStore, site: Site, seen: Seen
) -> None:
    asked: list[str] = []

    async def resolver(host: str, port: int) -> list[IPAddress]:
        asked.append(host)
        return [ip_address(each) for each in (answers.pop(0) if len(answers) > 1 else answers[0])]

    settings = FetchSettings(allowed_networks=(f"{HERE}/32",), allowed_ports=())
    fetcher = Fetcher(files, settings, resolver)
    if is_refused:
        with pytest.raises(AssetError):
            await fetcher.image(site.url("hops/0", "rebind.example"), BASE)
        assert seen.connected == []
    else:
        await fetcher.image(site.url("hops/0", "rebind.example"), BASE)
        assert seen.connected == [(HERE, site.port)]
    assert asked == ["rebind.example"]


async def test_t07_each_hop_is_resolved_once(files: FileStore, site: Site, seen: Seen) -> None:
    asked: list[str] = []

    async def resolver(host: str, port: int) -> list[IPAddress]:
        asked.append(host)
        return [ip_address(HERE if len(asked) < 4 else "127.0.0.1")]

    fetcher = Fetcher(files, FetchSettings(allowed_networks=(f"{HERE}/32",), allowed_ports=()), resolver)
    with pytest.raises(AssetError):
        await fetcher.image(site.url("hops/3", "a.example"), BASE)  # the fourth answer leads inside
    assert asked == ["a.example"] * 4
    assert seen.connected == [(HERE, site.port)] * 3


async def test_t08_what_was_checked_is_what_is_connected_to(worker: Worker, seen: Seen) -> None:
    """The guard and the connection read a URL in the same way, whatever others may read in it."""
    for url in INSIDE:
        for host in ("http://", "https://"):
            try:
                target = Guard(FetchSettings(allowed_ports=())).check_url(
                    httpx.URL(url.replace("http://", host))
                )
            except (AssetError, httpx.InvalidURL, ValueError):
                continue
            wanted = {str(each) for each in await names(target.host, target.port)}
            before = len(seen.connected)
            with pytest.raises(AssetError):
                await worker.get(AssetKind.IMAGE, url)
            assert {address[0] for address in seen.connected[before:]} <= wanted & {HERE}


@pytest.mark.parametrize(
    "variable", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"]
)
async def test_t09_proxies_of_the_environment_are_not_asked(
    variable: str, tmp_path: Path, files: FileStore, site: Site, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        await Worker(tmp_path, files).get(AssetKind.LORA, site.url("hops/0"))
    assert seen.connected == [(HERE, site.port)]


async def test_t09_sockets_of_this_machine_have_no_url(tmp_path: Path, worker: Worker, seen: Seen) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        for url in (
            f"http+unix://{str(path).replace('/', '%2F')}/",
            f"unix://{path}",
            f"http://unix:{path}",
            f"http://{str(path).replace('/', '%2F')}/",
            f"file://{path}",
        ):
            for kind in KINDS:
                with pytest.raises(AssetError):
                    await worker.get(kind, url)
    assert [each for each in seen.connected if isinstance(each, str | bytes)] == []


async def test_t09_only_the_server_s_own_address_means_its_own_files(
    files: FileStore, worker: Worker, site: Site, seen: Seen
) -> None:
    """A file's URL under another host is that file only because its name is a secret of 128 bits; a name
    that is not here is asked of that host, by the same rules."""
    key = await files.save(safetensors(3), "application/x-tar")
    await worker.get(AssetKind.IMAGE, f"{BASE}/files/{key}")
    assert seen.connected == []
    absent = "0" * 32 + ".png"
    for host in ("127.0.0.1", "localhost", "[::1]", "10.0.0.1"):
        with pytest.raises(AssetError):
            await worker.get(AssetKind.LORA, f"http://{host}:{site.port}/files/{absent}")
    assert seen.connected == []


async def test_t05_no_webhook_leads_inside(seen: Seen) -> None:
    """What the gateway lets through, for it would need a look-up, the sender refuses."""
    settings = WebhookSettings(allowed_ports=())
    guard, egress = Guard(settings), Egress(settings, names)
    for url in INSIDE:
        try:
            guard.check_text(url)
        except AssetError:
            continue
        with pytest.raises(AssetError):
            await egress.find(httpx.URL(url))
    assert seen.connected == []
