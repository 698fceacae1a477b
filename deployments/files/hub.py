"""The Hub's two addresses: what a repository has, and its files."""

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import BinaryIO
from urllib.parse import quote

from pydantic import BaseModel, NonNegativeInt, ValidationError

from deployments.files.fetch import Downloaded, Fetcher
from deployments.files.fetch import Report as Progress
from deployments.files.flights import Flights, Report
from schemas.errors import AssetError

MAX_LISTING_BYTES = 32 * 2**20
MAX_LISTINGS = 100  # kept in RAM
MAX_KEPT_FILES = 5000  # in one of them; what has more is listed anew each time
MAX_NAME = 255  # characters between two slashes

# Fills a sink with at most so many bytes, or returns None if what had the tag is unchanged.
Write = Callable[[BinaryIO, int, Progress, str | None], Awaitable[Downloaded | None]]
Sizes = Mapping[str, int | None]  # of files by their names; None: the Hub does not say


class Hub:
    """A server that speaks as huggingface.co does. Failures are AssetErrors that name the repository."""

    def __init__(self, fetcher: Fetcher, url: str, timeout_s: float, fresh_s: float) -> None:
        self.url = url.rstrip("/")
        self._fetcher = fetcher
        self._timeout_s = timeout_s
        self._fresh_s = fresh_s
        self._listings: OrderedDict[str, tuple[float, Sizes]] = OrderedDict()
        self._flights: Flights[Sizes] = Flights()

    async def listing(self, repo: str) -> Sizes:
        """The files of a repository, as it told a short while ago or tells now."""
        asked_at, sizes = self._listings.get(repo, (float("-inf"), {}))
        if time.monotonic() - asked_at < self._fresh_s:
            return sizes
        return await self._flights.join(repo, partial(self._ask, repo), lambda line: None)

    def file(self, repo: str, name: str) -> Write:
        """How one of its files is read."""
        return partial(self._download, repo, f"/{repo}/resolve/main/{quote(name)}")

    async def _ask(self, repo: str, report: Report) -> Sizes:
        body = BytesIO()
        path = f"/api/models/{repo}?blobs=true"  # with sizes
        await self._download(repo, path, body, MAX_LISTING_BYTES, lambda done, total: None, None)
        with told_of(repo):
            sizes = _read(body.getvalue())
        self._keep(repo, sizes)
        return sizes

    def _keep(self, repo: str, sizes: Sizes) -> None:
        self._listings.pop(repo, None)
        if len(sizes) <= MAX_KEPT_FILES:
            self._listings[repo] = time.monotonic(), sizes
        if len(self._listings) > MAX_LISTINGS:
            self._listings.popitem(last=False)

    async def _download(
        self, repo: str, path: str, sink: BinaryIO, limit: int, progress: Progress, etag: str | None
    ) -> Downloaded | None:
        with told_of(repo):
            return await self._fetcher.download(
                self.url + path, sink, limit, self._timeout_s, progress, etag=etag, internal_http=True
            )


@contextmanager
def told_of(repo: str) -> Iterator[None]:
    """What goes wrong inside is told with the repository's name."""
    try:
        yield
    except AssetError as error:
        raise AssetError(f"{repo} on the Hub: {error.message}", error.kind, error.ctx) from error


class _Sibling(BaseModel):
    rfilename: str
    size: NonNegativeInt | None = None


class _Listing(BaseModel):
    """What the Hub's API says of a repository, as far as it is needed."""

    siblings: list[_Sibling]


def _read(body: bytes) -> Sizes:
    try:
        siblings = _Listing.model_validate_json(body).siblings
    except ValidationError as error:
        raise AssetError("The list of files could not be read.", "file_download_error") from error
    for each in siblings:
        if not all(_is_plain(part) for part in each.rfilename.split("/")):
            message = f"The list of files has {each.rfilename[:100]!r}, which is no name of a file."
            raise AssetError(message, "file_download_error")
    return {each.rfilename: each.size for each in siblings}


def _is_plain(part: str) -> bool:
    """Whether a name between two slashes is one, and leads nowhere else."""
    return part not in ("", ".", "..") and not {"\\", "\0"} & set(part) and len(part) <= MAX_NAME
