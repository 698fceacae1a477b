"""Rendered manifests as one looks at them: pods, networks, what is served."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address, ip_network
from typing import Any

import yaml

from schemas.settings import FrontSettings, ModelSettings
from tests.support.kustomize import Manifest

STRANGER = {"app": "stranger"}  # a pod of another namespace


@dataclass(frozen=True)
class Pod:
    """A template of pods, and the Ray group that they belong to."""

    group: dict[str, Any]
    template: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.group.get("groupName", "head"))

    @property
    def is_head(self) -> bool:
        return "groupName" not in self.group

    @property
    def spec(self) -> dict[str, Any]:
        return self.template.get("spec", {})  # type: ignore[no-any-return]

    @property
    def labels(self) -> dict[str, str]:
        return self.template.get("metadata", {}).get("labels", {})  # type: ignore[no-any-return]

    @property
    def container(self) -> dict[str, Any]:
        return self.spec["containers"][0]  # type: ignore[no-any-return]

    @property
    def gpus(self) -> int:
        return int(self.container["resources"]["limits"].get("nvidia.com/gpu", 0))

    def ports(self) -> set[str]:
        return {each["name"] for each in self.container.get("ports", [])}


@dataclass(frozen=True)
class Cluster:
    manifests: list[Manifest]

    def of_kind(self, kind: str) -> list[Manifest]:
        return [each for each in self.manifests if each["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        return {each["metadata"]["name"] for each in self.of_kind(kind)}

    @property
    def service(self) -> dict[str, Any]:
        [service] = self.of_kind("RayService")
        return service["spec"]  # type: ignore[no-any-return]

    @property
    def ray(self) -> dict[str, Any]:
        return self.service["rayClusterConfig"]  # type: ignore[no-any-return]

    @property
    def head(self) -> Pod:
        group = self.ray["headGroupSpec"]
        return Pod(group, group["template"])

    @property
    def workers(self) -> list[Pod]:
        return [Pod(group, group["template"]) for group in self.ray["workerGroupSpecs"]]

    @property
    def pods(self) -> list[Pod]:
        return [self.head, *self.workers]

    @cached_property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load(self.service["serveConfigV2"])  # type: ignore[no-any-return]

    @property
    def front(self) -> FrontSettings:
        return FrontSettings.model_validate(self.config["applications"][0]["args"])

    @property
    def models(self) -> dict[str, ModelSettings]:
        return {
            each["name"]: ModelSettings.model_validate(each["args"])
            for each in self.config["applications"][1:]
        }

    def group_of(self, node_labels: dict[str, str]) -> list[Pod]:
        """The groups whose nodes have these labels."""
        return [each for each in self.workers if node_labels.items() <= each.group.get("labels", {}).items()]

    def lets_in(self, pod: Pod, port: int, source: dict[str, str], namespace: dict[str, str]) -> bool:
        """Whether a pod with these labels, in a namespace with these, may connect."""
        rules = self._rules(pod, "Ingress")
        return rules is None or any(
            _has_port(rule, port) and any(_selects(each, source, namespace) for each in rule.get("from", []))
            for rule in rules
        )

    def lets_out(self, pod: Pod, address: str, port: int) -> bool:
        """Whether it may connect to an address outside the cluster."""
        rules = self._rules(pod, "Egress")
        return rules is None or any(
            _has_port(rule, port) and ("to" not in rule or any(_covers(each, address) for each in rule["to"]))
            for rule in rules
        )

    def _rules(self, pod: Pod, direction: str) -> list[dict[str, Any]] | None:
        """None where no policy speaks of the pod: then everything is allowed."""
        speaking = [
            each["spec"]
            for each in self.of_kind("NetworkPolicy")
            if direction in each["spec"]["policyTypes"] and matches(each["spec"]["podSelector"], pod.labels)
        ]
        if not speaking:
            return None
        return [rule for spec in speaking for rule in spec.get(direction.lower()) or []]


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for each in selector.get("matchExpressions", []):
        is_there = each["key"] in labels
        if each["operator"] == "Exists" and not is_there:
            return False
        if each["operator"] == "In" and labels.get(each["key"]) not in each["values"]:
            return False
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def _selects(peer: dict[str, Any], source: dict[str, str], namespace: dict[str, str]) -> bool:
    if "ipBlock" in peer:
        return True  # a stranger may have any address
    if "namespaceSelector" in peer:
        return matches(peer["namespaceSelector"], namespace) and matches(peer.get("podSelector", {}), source)
    return namespace == {} and matches(peer["podSelector"], source)


def _has_port(rule: dict[str, Any], port: int) -> bool:
    return "ports" not in rule or any(
        each["port"] <= port <= each.get("endPort", each["port"]) for each in rule["ports"]
    )


def _covers(peer: dict[str, Any], address: str) -> bool:
    if "ipBlock" not in peer:
        return False  # pods only
    known = ip_address(address)
    block = peer["ipBlock"]
    return known in ip_network(block["cidr"]) and not any(
        known in ip_network(each) for each in block.get("except", [])
    )


def containers(pod: Pod, cluster: Cluster) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those of the pod, and the one that KubeRay puts beside the head."""
    for each in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
        yield f"{pod.name}/{each['name']}", each
    if pod.is_head and cluster.ray.get("enableInTreeAutoscaling"):
        yield "head/autoscaler", cluster.ray.get("autoscalerOptions", {})
