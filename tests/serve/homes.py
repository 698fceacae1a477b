"""A program for the server's cluster: which of three replicas serves which needs, one JSON line."""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

NAME = "homes"


class Replica:
    """Says who it is, and keeps whatever it was asked for."""

    def __init__(self) -> None:
        self._holds: dict[str, tuple[str, int]] = {}
        self._seconds = 0.1

    async def serve(self, needs: Sequence[str] = ()) -> int:
        self._holds |= {need: ("device", 10**9) for need in needs}
        return os.getpid()

    async def work(self, needs: Sequence[str] = ()) -> int:
        """As `serve`, and stays busy until it is cancelled: a request is known to take long."""
        self._seconds = 1000.0
        await asyncio.Event().wait()
        return os.getpid()

    def record_routing_stats(self) -> dict[str, Any]:
        return {"seconds": self._seconds, "holds": self._holds}


class Caller:
    """Makes several calls within one request."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas

    async def gather(self) -> list[int]:
        calls = (self._replicas.serve.remote(needs=[str(number)]) for number in range(4))
        return list(await asyncio.gather(*calls))


def elsewhere(replicas: Any, need: str, home: list[int]) -> int:
    """Which replica serves a need once the router has heard how busy its home is."""
    deadline = time.monotonic() + 10
    while (pid := int(replicas.serve.remote(needs=[need]).result())) in home:
        assert time.monotonic() < deadline, "the home keeps what it has no time for"
    return pid


def main() -> None:
    ray.init(namespace="serve", log_to_driver=False)
    no_cpus = {"num_cpus": 0}
    replica = serve.deployment(
        Replica,
        name="replica",
        num_replicas=3,
        max_ongoing_requests=4,
        ray_actor_options=no_cpus,
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.router.AffinityRouter", request_routing_stats_period_s=0.2
        ),
    ).bind()
    caller = serve.run(
        serve.deployment(Caller, name="caller", ray_actor_options=no_cpus).bind(replica),
        name=NAME,
        route_prefix=None,
    )
    replicas = serve.get_deployment_handle("replica", app_name=NAME)
    homes = {need: [replicas.serve.remote(needs=[need]).result() for _ in range(6)] for need in "abcdefgh"}
    busy = replicas.work.remote(needs=["a"])
    spilled = elsewhere(replicas, "a", homes["a"])
    gathered = caller.gather.remote().result(timeout_s=30)
    busy.cancel()
    print(json.dumps({"homes": homes, "spilled": spilled, "gathered": gathered}))
    serve.delete(NAME)


if __name__ == "__main__":
    main()
