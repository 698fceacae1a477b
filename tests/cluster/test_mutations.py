"""Manifests that are wrong on purpose: each is refused, and by whom it should be."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.support import crds, policies
from tests.support.cluster import Cluster
from tests.support.policies import Policy
from tests.support.schemas import by_kuberay, by_kubernetes

Mutation = Callable[[Cluster], object]
MUTATIONS: dict[str, tuple[Policy, Mutation]] = {}


def refused_by(who: Policy) -> Callable[[Mutation], Mutation]:
    """Names a mutation by what it does."""

    def register(mutation: Mutation) -> Mutation:
        MUTATIONS[mutation.__name__] = (who, mutation)
        return mutation

    return register


def gpu(cluster: Cluster) -> dict[str, Any]:
    """The container of the pods whose cards are shared."""
    return next(each for each in cluster.workers if each.name == "gpu-48gb").container


def front(cluster: Cluster) -> dict[str, Any]:
    return cluster.workers[0].container


def reconfigure(cluster: Cluster, application: str, **args: Any) -> None:
    """Give an application other args, in the configuration that is served."""
    [found] = [each for each in cluster.config["applications"] if each["name"] == application]
    found["args"].update(args)
    cluster.service["serveConfigV2"] = yaml.safe_dump(cluster.config)


def named(cluster: Cluster, kind: str, name: str) -> dict[str, Any]:
    return next(each for each in cluster.of_kind(kind) if each["metadata"]["name"] == name)


@refused_by(by_kuberay)
def a_misspelt_field(cluster: Cluster) -> None:
    cluster.ray["enableInTreeAutoscalling"] = cluster.ray.pop("enableInTreeAutoscaling")


@refused_by(by_kuberay)
def a_field_that_only_pods_have(cluster: Cluster) -> None:
    cluster.ray["headGroupSpec"]["serviceAccountName"] = "darkroom-head"


@refused_by(by_kuberay)
def text_for_a_number(cluster: Cluster) -> None:
    cluster.workers[0].group["minReplicas"] = "two"


@refused_by(by_kuberay)
def an_unknown_mode_of_authentication(cluster: Cluster) -> None:
    cluster.ray["authOptions"]["mode"] = "kerberos"


@refused_by(by_kuberay)
def an_upgrade_without_its_steps(cluster: Cluster) -> None:
    del cluster.service["upgradeStrategy"]["clusterUpgradeOptions"]["stepSizePercent"]


@refused_by(by_kuberay)
def memory_in_unknown_units(cluster: Cluster) -> None:
    gpu(cluster)["resources"]["limits"]["memory"] = "64Gib"


@refused_by(by_kuberay)
def a_port_twice(cluster: Cluster) -> None:
    cluster.head.container["ports"].append({"name": "again", "containerPort": 6379, "protocol": "TCP"})
    cluster.head.container["ports"].append({"name": "again", "containerPort": 6379, "protocol": "TCP"})


@refused_by(by_kubernetes)
def a_misspelt_budget(cluster: Cluster) -> None:
    spec = named(cluster, "PodDisruptionBudget", "darkroom-front")["spec"]
    spec["minAvailible"] = spec.pop("minAvailable")


@refused_by(by_kubernetes)
def a_policy_type_that_is_none(cluster: Cluster) -> None:
    named(cluster, "NetworkPolicy", "darkroom-default")["spec"]["policyTypes"] = "Ingress"


@refused_by(policies.the_head_has_no_gpu)
def a_gpu_on_the_head(cluster: Cluster) -> None:
    cluster.head.container["resources"]["limits"]["nvidia.com/gpu"] = "1"


@refused_by(policies.the_head_takes_no_work)
def work_on_the_head(cluster: Cluster) -> None:
    del cluster.head.group["rayStartParams"]["num-cpus"]


@refused_by(policies.the_head_takes_no_work)
def an_entry_that_may_run_anywhere(cluster: Cluster) -> None:
    reconfigure(cluster, "flux", entry_node_labels={})


@refused_by(policies.images_are_pinned)
def the_latest_image(cluster: Cluster) -> None:
    front(cluster)["image"] = "registry.example/darkroom:latest"


@refused_by(policies.nobody_is_root)
def root(cluster: Cluster) -> None:
    cluster.head.spec["securityContext"]["runAsUser"] = 0


@refused_by(policies.nobody_is_root)
def a_writable_root(cluster: Cluster) -> None:
    gpu(cluster)["securityContext"]["readOnlyRootFilesystem"] = False


@refused_by(policies.nobody_is_root)
def an_autoscaler_with_capabilities(cluster: Cluster) -> None:
    del cluster.ray["autoscalerOptions"]["securityContext"]["capabilities"]


@refused_by(policies.nobody_speaks_to_kubernetes)
def a_token_for_models(cluster: Cluster) -> None:
    cluster.workers[1].spec["automountServiceAccountToken"] = True


@refused_by(policies.nobody_speaks_to_kubernetes)
def the_autoscalers_token_for_ray(cluster: Cluster) -> None:
    mount = {"name": "kubernetes-token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
    cluster.head.container["volumeMounts"].append(mount)


@refused_by(policies.ray_wants_a_token)
def ray_without_a_token(cluster: Cluster) -> None:
    cluster.ray["authOptions"]["mode"] = "disabled"


@refused_by(policies.the_heads_state_survives)
def a_head_that_forgets(cluster: Cluster) -> None:
    del cluster.ray["gcsFaultToleranceOptions"]


@refused_by(policies.the_heads_state_survives)
def a_password_written_out(cluster: Cluster) -> None:
    cluster.ray["gcsFaultToleranceOptions"]["redisPassword"] = {"value": "hunter2"}


@refused_by(policies.the_autoscaler_is_v2)
def more_replicas_than_allowed(cluster: Cluster) -> None:
    cluster.workers[0].group["replicas"] = 9


@refused_by(policies.the_operator_takes_it)
def labels_among_the_parameters_of_ray(cluster: Cluster) -> None:
    group = cluster.workers[0].group
    group["rayStartParams"]["labels"] = "darkroom/nodes=" + group.pop("labels")["darkroom/nodes"]


@refused_by(policies.the_operator_takes_it)
def an_incremental_upgrade_without_the_autoscaler(cluster: Cluster) -> None:
    cluster.ray["enableInTreeAutoscaling"] = False


@refused_by(policies.upgrades_are_incremental)
def an_upgrade_that_needs_every_gpu_twice(cluster: Cluster) -> None:
    cluster.service["upgradeStrategy"] = {"type": "NewCluster"}


@refused_by(policies.pods_drain_longer_than_a_picture)
def a_picture_longer_than_the_drain(cluster: Cluster) -> None:
    reconfigure(cluster, "flux", drain_s=400)


@refused_by(policies.pods_drain_longer_than_a_picture)
def a_kill_before_the_drain_has_ended(cluster: Cluster) -> None:
    cluster.workers[1].spec["terminationGracePeriodSeconds"] = 30


@refused_by(policies.probes_exist)
def no_probe_of_readiness(cluster: Cluster) -> None:
    del front(cluster)["readinessProbe"]


@refused_by(policies.the_network_is_closed)
def no_wall_around_the_namespace(cluster: Cluster) -> None:
    for name in (
        "darkroom-default",
        "darkroom-inside",
        "darkroom-requests",
        "darkroom-metrics",
        "darkroom-head",
    ):
        cluster.manifests.remove(named(cluster, "NetworkPolicy", name))


@refused_by(policies.the_network_is_closed)
def a_gateway_that_reaches_every_port(cluster: Cluster) -> None:
    del named(cluster, "NetworkPolicy", "darkroom-requests")["spec"]["ingress"][0]["ports"]


@refused_by(policies.the_network_is_closed)
def a_dashboard_for_everybody(cluster: Cluster) -> None:
    [rule] = named(cluster, "NetworkPolicy", "darkroom-head")["spec"]["ingress"]
    rule["from"] = [{"namespaceSelector": {}}]


@refused_by(policies.metadata_is_out_of_reach)
def metadata_of_the_cloud(cluster: Cluster) -> None:
    [rule] = named(cluster, "NetworkPolicy", "darkroom-internet")["spec"]["egress"]
    rule["to"][0]["ipBlock"]["except"].remove("169.254.0.0/16")


@refused_by(policies.metadata_is_out_of_reach)
def all_of_ipv6(cluster: Cluster) -> None:
    [rule] = named(cluster, "NetworkPolicy", "darkroom-internet")["spec"]["egress"]
    rule["to"][1]["ipBlock"]["cidr"] = "::/0"


@refused_by(policies.models_fit_their_nodes)
def two_models_on_more_than_a_card(cluster: Cluster) -> None:
    reconfigure(cluster, "sd", num_gpus=0.7)


@refused_by(policies.models_fit_their_nodes)
def a_model_on_nodes_that_do_not_exist(cluster: Cluster) -> None:
    reconfigure(cluster, "flux", node_labels={"darkroom/nodes": "gpu-24gb"})


@refused_by(policies.models_fit_their_nodes)
def more_cpus_than_a_node_has(cluster: Cluster) -> None:
    reconfigure(cluster, "flux", num_cpus=12)


@refused_by(policies.memory_is_what_was_asked_for)
def memory_without_a_limit(cluster: Cluster) -> None:
    del gpu(cluster)["resources"]["limits"]["memory"]


@refused_by(policies.budgets_select_pods)
def a_budget_for_nobody(cluster: Cluster) -> None:
    budget = named(cluster, "PodDisruptionBudget", "darkroom-front")
    budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] = "gateway"


@refused_by(policies.budgets_select_pods)
def a_budget_that_forbids_every_drain(cluster: Cluster) -> None:
    named(cluster, "PodDisruptionBudget", "darkroom-front")["spec"]["minAvailable"] = 2


@refused_by(policies.secrets_are_references)
def a_password_in_the_configuration(cluster: Cluster) -> None:
    reconfigure(cluster, "darkroom", queue_url="postgresql://darkroom:hunter2@db/darkroom")


@refused_by(policies.secrets_are_documented)
def a_secret_that_nobody_was_told_of(cluster: Cluster) -> None:
    front(cluster)["envFrom"].append({"secretRef": {"name": "darkroom-surprise"}})


@refused_by(policies.volumes_exist)
def a_volume_that_is_none(cluster: Cluster) -> None:
    gpu(cluster)["volumeMounts"].append({"name": "scratch", "mountPath": "/scratch"})


@refused_by(policies.what_is_written_has_a_place)
def a_cache_on_the_read_only_root(cluster: Cluster) -> None:
    reconfigure(cluster, "sd", weights={"cache": "file:///var/cache/weights"})


@refused_by(policies.every_ray_process_has_the_environment)
def a_node_without_the_environment(cluster: Cluster) -> None:
    del gpu(cluster)["envFrom"][0]


@refused_by(policies.monitors_find_ports)
def a_monitor_of_no_port(cluster: Cluster) -> None:
    named(cluster, "PodMonitor", "darkroom")["spec"]["podMetricsEndpoints"][0]["port"] = "prometheus"


def test_there_are_at_least_25() -> None:
    assert len(MUTATIONS) >= 25


def test_every_policy_has_refused_something() -> None:
    assert {*policies.IN_PRODUCTION, by_kuberay, by_kubernetes} == {who for who, _ in MUTATIONS.values()}


@pytest.mark.parametrize("name", MUTATIONS)
def test_is_refused(production: Cluster, name: str) -> None:
    refuses, mutate = MUTATIONS[name]
    if refuses is by_kuberay and crds.folder() is None:
        pytest.skip("KubeRay's definitions are not here: set KUBERAY_CRDS to a folder with them")
    mutate(production)
    assert list(refuses(production)) != []
