"""What Ray is asked to book, and on which nodes."""

import warnings
from typing import Any

import pytest

from schemas.settings import FrontSettings, ModelSettings

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Ray's use of pydantic
    from deployments import app

pytestmark = pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")
GPU, FRONT = {"darkroom/nodes": "gpu-48gb"}, {"darkroom/nodes": "front"}


def options(bound: Any) -> dict[str, dict[str, Any]]:
    """The actor options of every deployment of an application, by its name."""
    found = {}
    todo = [bound]
    while todo:
        deployment = todo.pop()._bound_deployment
        found[deployment.name] = deployment.ray_actor_options
        todo += [each for each in deployment.init_args if hasattr(each, "_bound_deployment")]
    return found


def test_labels_say_on_which_nodes_a_deployment_runs() -> None:
    settings = ModelSettings(
        model="zoo:flux", endpoints=("x",), num_gpus=0.5, node_labels=GPU, entry_node_labels=FRONT
    )
    booked = options(app.model(settings))
    assert booked["worker"]["label_selector"] == GPU
    assert (booked["worker"]["num_gpus"], booked["worker"]["num_cpus"]) == (0.5, 1)
    assert booked["entry"]["label_selector"] == FRONT
    booked = options(app.front(FrontSettings(node_labels=FRONT)))
    assert [each["label_selector"] for each in booked.values()] == [FRONT, FRONT]


def test_without_labels_any_node_will_do() -> None:
    booked = options(app.front(FrontSettings())) | options(
        app.model(ModelSettings(model="zoo:flux", endpoints=("x",)))
    )
    assert set(booked) == {"gateway", "dispatcher", "worker", "entry"}
    assert not any(each.get("label_selector") for each in booked.values())
