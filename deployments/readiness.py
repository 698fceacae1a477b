"""Whether every application could take a request now, as Serve's control plane knows it."""

import asyncio
import contextvars
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

logger = logging.getLogger(__name__)

PATIENCE_S = 2.0  # with the control plane, before what it said last counts

Applications = Mapping[str, Any]  # name → Serve's ApplicationStatusOverview


class Readiness:
    """Asks the control plane, once at a time whoever wants to know.

    While that does not answer, requests are served all the same: then what it said last is told.
    """

    def __init__(self, ask: Callable[[], Applications]) -> None:
        """`ask` may block."""
        self._ask = ask
        self._asking: asyncio.Task[Applications] | None = None
        self._known: Applications = {}

    async def of(self, names: Collection[str]) -> bool:
        """Whether all these applications could take a request."""
        if self._asking is None:
            asking = asyncio.to_thread(self._ask)
            # in a clean context: it may outlive the call that began it
            self._asking = asyncio.get_running_loop().create_task(asking, context=contextvars.Context())
            self._asking.add_done_callback(self._hear)
        await asyncio.wait([self._asking], timeout=PATIENCE_S)
        return all(name in self._known and _serves(self._known[name]) for name in names)

    def _hear(self, asking: "asyncio.Task[Applications]") -> None:
        self._asking = None
        if asking.cancelled():
            return
        if (error := asking.exception()) is not None:
            logger.warning("the control plane does not say what runs: %s", error)
        else:
            self._known = asking.result()


def _serves(application: Any) -> bool:
    """It has come up, warm; or something of it runs on while a newer version comes, or fails to."""
    deployments = application.deployments.values()
    is_there = bool(deployments) and all(each.replica_states.get("RUNNING") for each in deployments)
    return application.status == "RUNNING" or is_there
