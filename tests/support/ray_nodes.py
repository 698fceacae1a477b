"""The process that holds the nodes of a `RayCluster`: commands come in, answers go out, one a line.

Ray's own Cluster starts every node as processes of this machine. This one ends with all of them when its
input does, or when it is killed.
"""

import json
import os
import sys
from typing import Any

from ray.cluster_utils import Cluster

from tests.support.processes import descendants, kill

JOIN_S = 180.0  # that a node may take to be known
ATTEMPTS = 5  # a raylet dies whose agents take more than 15 s to start, as on a busy machine


class Nodes:
    """Nodes by name. The first is the head; after it was killed, so is the next."""

    def __init__(self) -> None:
        self._cluster = Cluster(shutdown_at_exit=True)
        self._nodes: dict[str, Any] = {}

    def add(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        for attempt in range(1, ATTEMPTS + 1):
            before = set(descendants([os.getpid()]))
            try:
                node = self._cluster.add_node(wait=False, **options)
                break
            except Exception:
                if attempt == ATTEMPTS:
                    raise
                kill(set(descendants([os.getpid()])) - before)
        self._cluster._wait_for_node(node, JOIN_S)
        self._nodes[name] = node
        return {"id": node.node_id}

    def kill(self, name: str) -> None:
        """SIGKILL to all of the node's processes, as when its power fails."""
        node = self._nodes.pop(name)
        roots = [each.process.pid for group in node.all_processes.values() for each in group]
        kill(descendants(roots))
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_gcs(self) -> None:
        self._cluster.head_node.kill_gcs_server()

    def start_gcs(self) -> None:
        self._cluster.head_node.start_gcs_server()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    nodes = Nodes()
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(getattr(nodes, command)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
