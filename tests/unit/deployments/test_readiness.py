"""When the server says that it is ready, told by Serve's own words for what runs."""

import asyncio
import threading
import warnings
from collections.abc import Mapping

import pytest

from deployments import readiness
from deployments.readiness import Readiness

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Ray's use of pydantic
    from ray.serve.schema import (
        ApplicationStatus,
        ApplicationStatusOverview,
        DeploymentStatus,
        DeploymentStatusOverview,
        DeploymentStatusTrigger,
        ReplicaState,
    )


def application(status: str, **replicas: Mapping[str, int]) -> ApplicationStatusOverview:
    """`replicas`: deployment → state → how many."""
    deployments = {
        name: DeploymentStatusOverview(
            DeploymentStatus.UPDATING,
            DeploymentStatusTrigger.UNSPECIFIED,
            {ReplicaState(state): count for state, count in states.items()},
            "",
        )
        for name, states in replicas.items()
    }
    return ApplicationStatusOverview(ApplicationStatus(status), "", 0.0, deployments)


UP = application("RUNNING", entry={"RUNNING": 1}, worker={"RUNNING": 1})
STATES = [
    (UP, True),
    (application("RUNNING", entry={"RUNNING": 1}, worker={}), True),  # scaled to zero: a request wakes it
    (application("NOT_STARTED"), False),
    (application("DEPLOYING"), False),
    (application("DEPLOYING", entry={"RUNNING": 1}, worker={"STARTING": 1}), False),  # it loads, and warms up
    (
        application("DEPLOYING", entry={"RUNNING": 1}, worker={"RUNNING": 1, "STARTING": 1}),
        True,
    ),  # newer
    (application("DEPLOY_FAILED", entry={"RUNNING": 1}, worker={"RUNNING": 2}), True),  # that failed
    (application("DEPLOY_FAILED", entry={"RUNNING": 1}, worker={"STARTING": 1}), False),
    (application("UNHEALTHY", entry={"RUNNING": 1}, worker={"RUNNING": 1, "STARTING": 1}), True),
    (application("UNHEALTHY", entry={"RUNNING": 1}, worker={"STOPPING": 1}), False),
]


@pytest.mark.parametrize(("flux", "is_ready"), STATES, ids=range(len(STATES)))
async def test_ready_is_what_could_take_a_request(flux: ApplicationStatusOverview, is_ready: bool) -> None:
    ready = Readiness(lambda: {"darkroom": UP, "flux": flux})
    assert await ready.of({"darkroom", "flux"}) is is_ready
    assert await ready.of({"darkroom"})
    assert not await ready.of({"darkroom", "unknown"})


async def test_a_control_plane_that_fails_or_says_nothing_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[bool] = []
    freed = threading.Event()

    def ask() -> dict[str, ApplicationStatusOverview]:
        answers.append(True)
        if len(answers) == 2:
            raise ConnectionError("no head")
        if len(answers) == 3:
            freed.wait()
        return {"flux": UP if len(answers) == 1 else application("NOT_STARTED")}

    ready = Readiness(ask)
    assert await ready.of({"flux"})
    assert await ready.of({"flux"})
    assert "no head" in caplog.text
    monkeypatch.setattr(readiness, "PATIENCE_S", 0.01)
    try:
        assert await asyncio.gather(*(ready.of({"flux"}) for _ in range(20))) == [True] * 20
        assert len(answers) == 3  # all wait for one
    finally:
        freed.set()
    monkeypatch.setattr(readiness, "PATIENCE_S", 60)
    assert not await ready.of({"flux"})


async def test_nothing_is_ready_before_the_control_plane_has_spoken() -> None:
    def ask() -> dict[str, ApplicationStatusOverview]:
        raise ConnectionError("no head")

    assert not await Readiness(ask).of({"flux"})
