"""The files that requests name: fetched, decoded, kept from eviction while they are in use."""

import asyncio
import contextvars
import logging
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from PIL.Image import Image as Picture

from deployments.affinity import Holding, Tier
from deployments.files.fetch import Fetcher
from deployments.files.store import FileStore
from deployments.files.weights import Weights
from deployments.pictures.decoders import Decoders
from deployments.worker.holdings import Holdings, Keeper
from pipelines import sources
from pipelines.base import Assets
from schemas.assets import Asset, AssetKind, assets, weights
from schemas.errors import AssetError, FieldError, InputError, Location
from schemas.fields import EndpointInput
from schemas.jobs import Job, JobEvent, Logged
from schemas.settings import ModelSettings

logger = logging.getLogger(__name__)

PREFETCHES = 2  # files fetched ahead at once

_Fetched = Picture | Path | bytes | AssetError


class Intake:
    """Fetches for one replica. Used on one event loop."""

    def __init__(self, settings: ModelSettings, files: FileStore, keeper: Keeper) -> None:
        """`keeper` has the weights that are in memory."""
        self._fetcher = Fetcher(files, settings.fetch)
        self._weights = Weights(self._fetcher, settings, sources.locate)
        self._decoders = Decoders(settings.picture_decoders)
        self._holdings = Holdings(keeper)
        self._places = asyncio.Semaphore(PREFETCHES)
        self._ahead: set[asyncio.Task[None]] = set()  # fetches for jobs that are yet to come

    def close(self) -> None:
        self._decoders.close()

    def holdings(self) -> dict[str, Holding]:
        """The weights that requests have named, by their assets' digests, and where they are here."""
        return self._holdings.told()

    def tiers(self, request: EndpointInput) -> list[Tier | None]:
        """Where each of the request's weights is now."""
        return [self._holdings.tier(asset) for asset in weights(request)]

    async def fetch(
        self, job: Job, request: EndpointInput, stack: AsyncExitStack, emit: Callable[[JobEvent], None]
    ) -> Assets:
        """Get every file that the request names, all at once; `stack` keeps them from eviction.

        Raises InputError that names each field whose file cannot be had.
        """

        async def got(asset: Asset) -> _Fetched:
            try:
                if asset.kind is AssetKind.IMAGE:
                    data = await self._fetcher.image(asset.source, job.base_url)
                    return await self._decoders.decode(data)
                if asset.kind is AssetKind.CONFIG:
                    return await self._fetcher.config(asset.source, job.base_url)
                lease = await self._weights.locate(asset, job.base_url, lambda line: emit(Logged(line)))
                path = stack.enter_context(lease)
                self._holdings.note(asset, path)
                return path
            except AssetError as error:
                return error

        refs = list(assets(request))
        wanted = dict.fromkeys(ref.asset for ref in refs)
        try:
            async with asyncio.TaskGroup() as group:
                found = {asset: group.create_task(got(asset)) for asset in wanted}
        except ExceptionGroup as failed:  # such as a full disk; the first has ended the others
            raise failed.exceptions[0] from None
        fetched = _by_field((ref.loc, found[ref.asset].result()) for ref in refs)
        if nbytes := self._holdings.unloaded_nbytes(weights(request)):
            emit(Logged(f"loading {nbytes / 1e6:,.1f} MB of weights"))
        return fetched

    def prefetch(self, job: Job, request: EndpointInput) -> None:
        """Begin to fetch the weights that a job names, so that they are on disk when it comes.

        Returns at once. It is only a cache: what goes wrong here, the job meets and tells when it runs.
        """
        # in a clean context: it outlives the call that began it
        task = asyncio.get_running_loop().create_task(
            self.keep(job, weights(request)), context=contextvars.Context()
        )
        self._ahead.add(task)
        task.add_done_callback(self._ahead.discard)

    async def keep(self, job: Job, named: Iterable[Asset]) -> None:
        """Have weights in the cache on disk, unpinned."""
        await asyncio.gather(*(self._keep(asset, job) for asset in named))

    async def _keep(self, asset: Asset, job: Job) -> None:
        async with self._places:
            try:
                lease = await self._weights.locate(asset, job.base_url, lambda line: None)
            except (AssetError, OSError) as error:
                logger.info("a file of request %s was not fetched ahead: %s", job.request_id, error)
            else:
                self._holdings.note(asset, lease.path)
                lease.release()


def _by_field(named: Iterable[tuple[Location, _Fetched]]) -> Assets:
    """Every file under the fields that name it. Raises InputError that names each without one."""
    pictures: dict[Location, Picture] = {}
    weights: dict[Location, Path] = {}
    configs: dict[Location, bytes] = {}
    faults: list[FieldError] = []
    for loc, found in named:
        match found:
            case Picture():
                pictures[loc] = found
            case Path():
                weights[loc] = found
            case bytes():
                configs[loc] = found
            case AssetError():
                faults += found.at(loc).fields
    if faults:
        raise InputError(faults)
    return Assets(pictures, weights, configs)
