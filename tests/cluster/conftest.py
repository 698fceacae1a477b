"""The manifests as they are applied."""

from copy import deepcopy

import pytest

from tests.support.cluster import Cluster
from tests.support.kustomize import Manifest, rendered
from tests.support.server import ROOT

OVERLAYS = ROOT / "cluster" / "overlays"


@pytest.fixture(scope="session")
def _production() -> list[Manifest]:
    return rendered(OVERLAYS / "prod")


@pytest.fixture
def production(_production: list[Manifest]) -> Cluster:
    """A copy that may be changed."""
    return Cluster(deepcopy(_production))


@pytest.fixture(params=["dev", "prod"])
def overlay(request: pytest.FixtureRequest) -> Cluster:
    return Cluster(rendered(OVERLAYS / request.param))
