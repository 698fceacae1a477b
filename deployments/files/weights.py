"""The weights that requests name, from any source, as local files and folders."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from deployments.files.cache import Cache, Lease
from deployments.files.choices import choose, unavailable
from deployments.files.fetch import Fetcher
from deployments.files.flights import Report
from deployments.files.hub import Hub, Sizes, told_of
from deployments.files.origins import WEIGHTS, Origin, Origins, Repository
from schemas.assets import Asset
from schemas.errors import AssetError
from schemas.settings import ModelSettings

FRESH_S = 600.0  # after so long a source is asked whether its content changed
PARALLEL = 4  # files of one repository that are fetched at once
MAX_FILES = 100  # of one repository
MAX_TEXT_BYTES = 32 * 2**20  # of a repository's configs and vocabularies together

Source = Callable[[str], Path | str]  # what an operator's word for a model leads to: a path, or another word


class Weights:
    """Finds weights by what requests call them, and keeps them on disk."""

    def __init__(
        self, fetcher: Fetcher, settings: ModelSettings, source: Source, fresh_s: float = FRESH_S
    ) -> None:
        """Raises ValueError for a name in the settings that leads nowhere."""
        self._hub = Hub(fetcher, settings.weights.hub_url, settings.fetch.weights_timeout_s, fresh_s)
        self._origins = Origins(fetcher, self._hub, settings, source)
        self._cache = Cache(settings.weights, fresh_s)

    async def locate(self, asset: Asset, base_url: str, report: Report) -> Lease:
        """The file or folder that `asset` names, downloaded if need be; `report` gets lines for people.

        Its source is one of the server's own names, an https URL (http inside the allowed networks),
        a file URL of the server at `base_url`, or a Hub id. A model of several files is a folder, an
        image encoder one with its config. The name of what was downloaded stands for its content, and
        its path stays the same. An operator's model is where it lies; the one that the server has
        started with is told by the settings' word for it, `Path("zoo:sd15")`. Raises AssetError.
        """
        match self._origins.of(asset, base_url):
            case Origin() as origin:
                return await self._cache.locate(origin, report)
            case Repository() as repository:
                return await self._locate_in(repository, report)
            case path:
                return Lease(path, lambda: None)

    def check_integrity(self) -> list[str]:
        """See Cache.check_integrity."""
        return self._cache.check_integrity()

    async def _locate_in(self, repository: Repository, report: Report) -> Lease:
        """What is meant of a Hub repository."""
        sizes = await self._hub.listing(repository.name)
        with told_of(repository.name):
            choice = choose(repository.name, sizes, repository.asset)
            if not isinstance(choice, str):
                _check_sizes(sizes, choice.values(), repository.limit)
        if isinstance(choice, str):
            return await self._cache.locate(self._origins.file_in(repository, choice), report)
        return await self._gather(repository, choice, report)

    async def _gather(self, repository: Repository, files: Mapping[str, str], report: Report) -> Lease:
        """A folder of a repository's files, `files` by the names that they get in it."""
        found: dict[str, Lease] = {}
        gate = asyncio.Semaphore(PARALLEL)

        async def fetch(name: str, origin: Origin) -> None:
            async with gate:
                lease = await self._cache.locate(origin, report if origin.suffix == WEIGHTS else _say_nothing)
            held.callback(lease.release)
            found[name] = lease

        with ExitStack() as held:
            try:
                async with asyncio.TaskGroup() as group:
                    for name, origin in self._origins_of(repository, files):
                        group.create_task(fetch(name, origin))
            except ExceptionGroup as failed:  # the first will do; it has ended the others
                raise failed.exceptions[0] from None
            came = (lease.path.stat().st_size for lease in found.values())  # the Hub need not say before
            _check_sum(came, repository.limit, "files together")
            held.pop_all()
            return self._cache.gather(found)

    def _origins_of(self, repository: Repository, files: Mapping[str, str]) -> Iterator[tuple[str, Origin]]:
        """Where each file comes from; the large ones are counted for people."""
        large = [file for file in files.values() if file.endswith(WEIGHTS)]
        for name, file in files.items():
            part = file
            if file in large:
                part = f"{Path(file).parent.name or file} ({large.index(file) + 1} of {len(large)})"
            yield name, self._origins.file_in(repository, file, part)


def _say_nothing(line: str) -> None:
    pass


def _check_sizes(sizes: Sizes, files: Iterable[str], limit: int) -> None:
    """Refuse a repository by what the Hub says of the files that are wanted."""
    wanted = {file: sizes[file] or 0 for file in files}
    if len(wanted) > MAX_FILES:
        raise unavailable(f"The model has {len(wanted)} files; at most {MAX_FILES} are loaded.")
    _check_sum(wanted.values(), limit, "files together")
    texts = (size for file, size in wanted.items() if not file.endswith(WEIGHTS))
    _check_sum(texts, MAX_TEXT_BYTES, "configs and vocabularies together")


def _check_sum(sizes: Iterable[int], most: int, what: str) -> None:
    if (found := sum(sizes)) > most:
        message = f"The model's {what} have {found} bytes; this server takes {most}."
        raise AssetError(message, "file_too_large", {"max_size": most})
