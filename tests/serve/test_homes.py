"""Serve sends requests where their weights are."""

import json

from tests.serve.test_handles import call
from tests.support.server import Server


def test_needs_have_homes_and_leave_them_when_those_are_busy(server: Server) -> None:
    *_, line = call(server, "tests/serve/homes.py")
    found = json.loads(line)
    homes = {need: set(pids) for need, pids in found["homes"].items()}
    assert all(len(pids) == 1 for pids in homes.values()), "each need has one home"
    assert len(set.union(*homes.values())) == 3, "the needs are spread"
    assert found["spilled"] not in homes["a"], "a long wait is worth a load"
    assert len(found["gathered"]) == 4, "calls that share a parent request all end"
