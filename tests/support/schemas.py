"""Manifests against the schemas of their kinds, strictly: KubeRay's own, and those of Kubernetes."""

from collections.abc import Iterator

import kubernetes_validate

from tests.support import crds
from tests.support.cluster import Cluster

KUBERNETES = "1.34"
OTHERS = ("PodMonitor", "PrometheusRule")  # of the Prometheus operator, whose schemas are not at hand


def by_kuberay(cluster: Cluster) -> Iterator[str]:
    """Why KubeRay's schemas refuse a service. They must be at hand, see `crds`."""
    folder = crds.folder()
    assert folder is not None
    for manifest in cluster.of_kind("RayService"):
        yield from crds.errors(manifest, folder)


def by_kubernetes(cluster: Cluster) -> Iterator[str]:
    """Why Kubernetes' own refuse any of the rest."""
    for manifest in cluster.manifests:
        if manifest["kind"] in ("RayService", *OTHERS):
            continue
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{manifest['kind']}: {error.message}"
