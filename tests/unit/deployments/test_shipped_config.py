"""The serve_config.yaml that is shipped."""

import warnings
from typing import Any

import yaml

from schemas.settings import FrontSettings, ModelSettings
from tests.support.server import ROOT

SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
CORES = 2  # of the smallest machine that it must start on


def test_all_applications_together_fit_on_two_cores() -> None:
    """Ray would wait forever for CPUs that the machine does not have."""
    front, *models = (app["args"] for app in SHIPPED["applications"])
    fronts = FrontSettings(**front).gateway_replicas + 1  # and one dispatcher
    workers = [ModelSettings(**args) for args in models]
    booked = fronts * front_cpus() + sum(each.num_cpus * each.max_replicas for each in workers)
    assert booked <= CORES


def front_cpus() -> float:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Ray's use of pydantic
        from deployments.app import FRONT_CPUS
    return FRONT_CPUS
