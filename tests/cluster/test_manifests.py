"""What `kubectl apply -k cluster/overlays/…` would send: it fits the schemas, and keeps our promises."""

import json
import shutil
import subprocess
import warnings
from typing import Any

import pytest
import yaml

from deployments import server
from tests.cluster.conftest import OVERLAYS
from tests.support import crds
from tests.support.cluster import Cluster
from tests.support.kustomize import rendered
from tests.support.policies import (
    EVERYWHERE,
    IN_PRODUCTION,
    Policy,
    images_are_pinned,
    metadata_is_out_of_reach,
    nobody_is_root,
    nobody_speaks_to_kubernetes,
    ray_wants_a_token,
    the_network_is_closed,
)
from tests.support.schemas import by_kuberay, by_kubernetes


def test_kubernetes_own_schemas_take_every_manifest(overlay: Cluster) -> None:
    assert list(by_kubernetes(overlay)) == []


def test_kuberays_schemas_take_the_service(overlay: Cluster) -> None:
    if crds.folder() is None:
        pytest.skip("KubeRay's definitions are not here: set KUBERAY_CRDS to a folder with them")
    assert list(by_kuberay(overlay)) == []


@pytest.mark.parametrize("policy", EVERYWHERE, ids=lambda policy: policy.__name__)
def test_every_overlay_keeps(overlay: Cluster, policy: Policy) -> None:
    assert list(policy(overlay)) == []


@pytest.mark.parametrize(
    "policy", [each for each in IN_PRODUCTION if each not in EVERYWHERE], ids=lambda policy: policy.__name__
)
def test_production_keeps(production: Cluster, policy: Policy) -> None:
    assert list(policy(production)) == []


def test_serve_reads_what_it_is_given(overlay: Cluster) -> None:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Ray's use of pydantic
        from ray.serve.schema import ServeDeploySchema

        schema = ServeDeploySchema.model_validate(overlay.config)
    assert {"darkroom", "flux", "sdxl-canny", "sd"} == {each.name for each in schema.applications}
    assert set(overlay.config) <= set(
        ServeDeploySchema.model_fields
    )  # Serve itself drops what it does not know
    server.check_config(overlay.config)


def test_the_operators_commands_find_the_configuration_that_is_served(overlay: Cluster) -> None:
    [config] = [
        each for each in overlay.of_kind("ConfigMap") if each["metadata"]["name"] == "darkroom-config"
    ]
    assert yaml.safe_load(config["data"]["serve_config.yaml"]) == overlay.config
    [front] = [each for each in overlay.workers if each.name == "front"]
    mounted = {each["mountPath"]: each["name"] for each in front.container["volumeMounts"]}
    assert mounted[front.container["workingDir"]] == "config"


def test_a_group_of_nodes_sleeps_until_its_models_are_asked_for(production: Cluster) -> None:
    for model in production.models.values():
        [pod] = production.group_of(model.node_labels)
        assert (pod.group["minReplicas"], model.min_replicas) == (0, 0)


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_what_renders_here_is_what_kubectl_renders(name: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    told = subprocess.run(
        [kubectl, "kustomize", OVERLAYS / name], capture_output=True, text=True, check=True
    ).stdout

    def ordered(manifests: list[Any]) -> list[str]:
        return sorted(json.dumps(each, sort_keys=True) for each in manifests)

    assert ordered(list(yaml.safe_load_all(told))) == ordered(rendered(OVERLAYS / name))


def test_t09_pods_reach_the_internet_but_no_metadata_and_nothing_inside(overlay: Cluster) -> None:
    assert list(metadata_is_out_of_reach(overlay)) == []


def test_t35_images_are_pinned_and_locked_down(overlay: Cluster) -> None:
    assert [
        *images_are_pinned(overlay),
        *nobody_is_root(overlay),
        *nobody_speaks_to_kubernetes(overlay),
    ] == []


def test_t36_rays_ports_are_closed_and_want_a_token(overlay: Cluster) -> None:
    assert [*the_network_is_closed(overlay), *ray_wants_a_token(overlay)] == []
