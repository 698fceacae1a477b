"""Gets the files that requests name: data URIs, files of this server, and http(s) URLs.

Every URL, those that redirects lead to included, goes through the egress, which checks where it leads.
"""

import asyncio
import base64
import binascii
import hashlib
import io
import re
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import BinaryIO

import httpx
from pydantic_core import from_json

from deployments.files.egress import Egress, Resolver, resolve
from deployments.files.guard import parse
from deployments.files.store import FileStore
from schemas.errors import AssetError
from schemas.settings import FetchSettings

SILENCE_S = 60.0  # a server that sends nothing for so long is given up
CHUNK_BYTES = 2**18
DATA_HEADER_CHARS = 1000  # media type and parameters of a data URI

Report = Callable[[int, int | None], None]  # bytes so far, bytes in all when known

_PLAIN = {"Accept": "*/*", "Accept-Encoding": "identity"}
_REDIRECTS = (301, 302, 303, 307, 308)
_OWN_PATH = re.compile(r"/files/([^/]+)")
_FILE_PATH = re.compile(r".*/files/([^/]+)")  # whatever a proxy in front put before it
_STRONG_ETAG = re.compile(r'"[!#-~]{1,200}"')


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What has been written to a sink."""

    bytes: int
    sha256: str
    etag: str | None = None


class Fetcher:
    """Downloads under the limits of its settings. Every failure is an AssetError.

    Proxy variables are ignored; SSL_CERT_FILE and SSL_CERT_DIR may name the operator's own authorities.
    """

    def __init__(
        self,
        files: FileStore,
        settings: FetchSettings,
        resolver: Resolver = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._files = files
        self._settings = settings
        self._egress = Egress(settings, resolver, tls)

    async def image(self, source: str, base_url: str) -> bytes:
        """The bytes behind a data URI, a file URL of the server at `base_url`, or an http(s) URL."""
        return await self._read(source, base_url, self._settings.max_image_bytes)

    async def config(self, source: str, base_url: str) -> bytes:
        """The JSON object behind the same kinds of source."""
        data = await self._read(source, base_url, self._settings.max_config_bytes)
        _check_config(data)
        return data

    async def _read(self, source: str, base_url: str, limit: int) -> bytes:
        if source[:5].lower() == "data:":
            return decode_data_uri(source, limit)
        sink = io.BytesIO()
        key = own_key(source, base_url)
        if key is not None:
            await self.copy(key, sink, limit, _unreported)
        else:
            await self.download(source, sink, limit, self._settings.image_timeout_s, _unreported)
        return sink.getvalue()

    async def copy(self, key: str, sink: BinaryIO, limit: int, report: Report) -> Downloaded:
        """Write the server's own file `key` to `sink`. Its tag is its key: what a key names never changes."""
        found = await self._files.open(key)
        if found is None:
            raise _failure("This server has no such file.")
        return replace(await drain(found.chunks, found.size, sink, limit, report), etag=key)

    async def download(
        self,
        url: str,
        sink: BinaryIO,
        limit: int,
        timeout_s: float,
        report: Report,
        *,
        etag: str | None = None,
        internal_http: bool = False,
        takes_own: bool = True,
    ) -> Downloaded | None:
        """Write what `url` leads to into `sink`: at most `limit` bytes, within `timeout_s`.

        Returns None, with nothing written, when the server says that what had `etag` is unchanged.
        `internal_http` keeps plain http to the networks that the settings allow. A file of this server
        is copied, whatever the host is called: 128 random bits name no other file by chance. Without
        `takes_own` the host is asked all the same, for one who trusts hosts by their names.
        """
        own = await self._own(url) if takes_own else None
        if own is not None:
            return None if etag == own else await self.copy(own, sink, limit, report)
        headers = {"If-None-Match": etag} if etag else {}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._response(parse(url), headers, internal_http) as response,
            ):
                if etag and response.status_code == 304:
                    return None
                size = _check_answer(response)
                body = response.aiter_raw(CHUNK_BYTES)
                done = await drain(body, size, sink, limit, report)
                return replace(done, etag=_strong_etag(response))
        except TimeoutError as error:
            raise _failure(f"The download took longer than {timeout_s:g} seconds.") from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _failure("No connection to the server could be made.") from error
        except (httpx.TransportError, ssl.SSLError) as error:
            raise _failure("The connection broke before the file was complete.") from error

    async def _own(self, url: str) -> str | None:
        """The key of a file that this server has, in a URL with any host."""
        match = _FILE_PATH.fullmatch(parse(url).path)
        return match[1] if match and await self._files.has(match[1]) else None

    @asynccontextmanager
    async def _response(
        self, url: httpx.URL, headers: dict[str, str], internal_http: bool
    ) -> AsyncIterator[httpx.Response]:
        """The first answer that is no redirect."""
        for _ in range(self._settings.max_redirects + 1):
            place = await self._egress.find(url)
            if internal_http and url.scheme == "http" and not place.is_internal:
                raise _failure("Plain http cannot be trusted here: use https.")
            async with self._egress.ask(place, "GET", _PLAIN | headers, SILENCE_S) as response:
                if response.status_code not in _REDIRECTS:
                    yield response
                    return
                url = _next(url, response)
        raise _failure(f"The URL redirects more than {self._settings.max_redirects} times.")


def own_key(source: str, base_url: str) -> str | None:
    """The key in a file URL of the server at `base_url`, or None."""
    try:
        url, base = httpx.URL(source), httpx.URL(base_url)
        host, own = url.raw_host, base.raw_host  # `host` decodes it, and raises for what is no name
    except (httpx.InvalidURL, ValueError):  # an IPv6 address may have words that are not ASCII
        return None
    if url.scheme not in ("http", "https") or url.userinfo or not host or host != own:
        return None
    match = _OWN_PATH.fullmatch(url.path) or _OWN_PATH.fullmatch(url.path.removeprefix(base.path.rstrip("/")))
    return match[1] if match else None


def decode_data_uri(source: str, limit: int) -> bytes:
    """The bytes in `data:TYPE;PARAMETERS,DATA`, whatever the type says. Raises AssetError."""
    header, comma, payload = source[5 : 5 + DATA_HEADER_CHARS].partition(",")
    if not comma:
        raise _failure("The data URI has no comma between header and data.")
    payload = source[5 + len(header) + 1 :]
    is_base64 = header.split(";")[-1].strip().lower() == "base64"
    if len(payload) > (4 * (limit // 3 + 1) if is_base64 else 3 * limit):
        raise too_large(limit)
    try:
        data = _percent_decoded(payload)
        if is_base64:
            data = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise _failure("The data URI is damaged: its data is not what its header says.") from error
    if len(data) > limit:
        raise too_large(limit)
    return data


def _percent_decoded(text: str) -> bytes:
    """Raises ValueError for what is not ASCII or has a % without two digits."""
    encoded = text.encode("ascii")
    if b"%" not in encoded:
        return encoded
    if re.search(rb"%(?![0-9A-Fa-f]{2})", encoded):
        raise ValueError("a % without two hexadecimal digits")
    # Quoted-printable differs by its sign only, and takes no Python object for each escape.
    return binascii.a2b_qp(encoded.replace(b"=", b"=3D").replace(b"%", b"="))


def _next(url: httpx.URL, response: httpx.Response) -> httpx.URL:
    """Where a redirect leads."""
    location = response.headers.get("location")
    if not location:
        raise _failure(f"The server answered {response.status_code} without saying where to go.")
    try:
        following = url.join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise _failure("The server redirects to what is not a valid URL.") from error
    if url.scheme == "https" and following.scheme == "http":
        raise _failure("The server redirects from https to http.")
    return following


def _check_answer(response: httpx.Response) -> int | None:
    """The size that the server announces, if any. Refuses all but a plain 200."""
    if response.status_code != 200:
        raise _failure(f"The server answered {response.status_code}.")
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise _failure("The server sent a compressed body that was not asked for.")
    length = response.headers.get("content-length", "")
    return int(length) if length.isdecimal() else None


def _check_config(data: bytes) -> None:
    """Refuse what is no JSON object."""
    try:
        found = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise _failure("A config must be a JSON object; this is no JSON.") from error
    if not isinstance(found, dict):
        raise _failure("A config must be a JSON object; this is another JSON value.")


def _strong_etag(response: httpx.Response) -> str | None:
    """The entity tag, if it stands for the very bytes."""
    tag: str = response.headers.get("etag", "")
    return tag if _STRONG_ETAG.fullmatch(tag) else None


async def drain(
    chunks: AsyncIterable[bytes], size: int | None, sink: BinaryIO, limit: int, report: Report
) -> Downloaded:
    """Write the chunks to `sink`, counting and hashing them."""
    if size is not None and size > limit:
        raise too_large(limit)
    digest = hashlib.sha256()
    count = 0
    async for chunk in chunks:
        count += len(chunk)
        if count > limit:
            raise too_large(limit)
        digest.update(chunk)
        await asyncio.to_thread(sink.write, chunk)
        report(count, size)
    return Downloaded(count, digest.hexdigest())


def _unreported(done: int, total: int | None) -> None:
    pass


def _failure(message: str) -> AssetError:
    return AssetError(message, "file_download_error")


def too_large(limit: int) -> AssetError:
    return AssetError(f"The file is larger than {limit} bytes.", "file_too_large", {"max_size": limit})
