"""What our manifests promise beyond their schemas. Each says what breaks it, a line for each."""

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from deployments.server import CLUSTER_ENVIRONMENT
from tests.support.cluster import STRANGER, Cluster, Pod, containers, matches
from tests.support.server import ROOT

Policy = Callable[[Cluster], Iterator[str]]

RAY_PORTS = (
    6379,
    8265,
    10001,
    52365,
    44217,
    44227,
    8080,
    30000,
)  # GCS, dashboard, clients, agent, metrics, replicas
METADATA = ("169.254.169.254", "fd00:ec2::254", "169.254.170.2", "100.100.100.200", "168.63.129.16")
INSIDE = (
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "127.0.0.1",
    "::1",
    "fe80::1",
    "fd00::1",
    "2002:a00:1::",
)
# Asks Ray to move the replicas of a pod elsewhere, and waits until the last one has ended, a look each 2 s.
_DRAINS = re.compile(
    r"timeout 30 ray drain-node .* --deadline-remaining-seconds (\d+) && "
    r"for _ in \{1\.\.(\d+)\}; do grep -qs '\[S\]erveReplica' /proc/\[0-9\]\*/cmdline "
    r"\|\| break; sleep 2; done"
)
KEPT_S = 30  # between the end of a drain and the kill


def the_head_has_no_gpu(cluster: Cluster) -> Iterator[str]:
    if cluster.head.gpus or cluster.head.group["rayStartParams"].get("num-gpus", "0") != "0":
        yield "the head books a GPU"


def the_head_takes_no_work(cluster: Cluster) -> Iterator[str]:
    if cluster.head.group["rayStartParams"].get("num-cpus") != "0":
        yield "the head offers CPUs"
    if not cluster.service.get("excludeHeadPodFromServeSvc"):
        yield "requests reach the head"
    settings = [cluster.front.node_labels, *(each.entry_node_labels for each in cluster.models.values())]
    if any(labels == {} for labels in settings):
        yield "what books no CPU may be placed on the head"


def images_are_pinned(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        for name, container in containers(pod, cluster):
            tag = container.get("image", "autoscaler:of-the-head").rpartition("/")[2].partition(":")[2]
            if tag in ("", "latest"):
                yield f"{name}: {container['image']}"


def nobody_is_root(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        user = pod.spec.get("securityContext", {})
        if not user.get("runAsNonRoot") or user.get("runAsUser", 0) < 10_000:
            yield f"{pod.name}: runs as {user.get('runAsUser')}"
        if any(pod.spec.get(each) for each in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.name}: is on its host"
        for name, container in containers(pod, cluster):
            context = container.get("securityContext", {})
            wanted = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }
            if context != wanted:
                yield f"{name}: {context}"


def nobody_speaks_to_kubernetes(cluster: Cluster) -> Iterator[str]:
    for account in cluster.of_kind("ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {account['metadata']['name']} mounts its token"
    for pod in cluster.pods:
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name} mounts a token"
        if pod.spec.get("serviceAccountName") not in cluster.names("ServiceAccount"):
            yield f"{pod.name} has no account of ours"
        tokens = {each["name"] for each in pod.spec.get("volumes", []) if "projected" in each}
        if tokens & {each["name"] for each in pod.container.get("volumeMounts", [])}:
            yield f"{pod.name}: Ray itself has the autoscaler's token"


def ray_wants_a_token(cluster: Cluster) -> Iterator[str]:
    options = cluster.ray.get("authOptions", {})
    if options.get("mode") != "token" or not options.get("secretName"):
        yield f"authOptions are {options}"


def the_heads_state_survives(cluster: Cluster) -> Iterator[str]:
    options = cluster.ray.get("gcsFaultToleranceOptions")
    if options is None or not options.get("redisAddress"):
        yield "the GCS keeps its state in memory"
    elif "secretKeyRef" not in options.get("redisPassword", {}).get("valueFrom", {}):
        yield "the password of Redis is no reference"


def the_autoscaler_is_v2(cluster: Cluster) -> Iterator[str]:
    if (
        not cluster.ray.get("enableInTreeAutoscaling")
        or cluster.ray["autoscalerOptions"].get("version") != "v2"
    ):
        yield "no autoscaler, or an old one"
    for pod in cluster.pods:
        if pod.spec.get("restartPolicy", "Never") != "Never":
            yield f"{pod.name}: the autoscaler v2 wants restartPolicy Never"
    for pod in cluster.workers:
        least, now, most = (pod.group.get(each) for each in ("minReplicas", "replicas", "maxReplicas"))
        if least is None or now is None or most is None or not least <= now <= most or most < 1:
            yield f"{pod.name}: {least} ≤ {now} ≤ {most}"


def upgrades_are_incremental(cluster: Cluster) -> Iterator[str]:
    strategy = cluster.service.get("upgradeStrategy", {})
    options = strategy.get("clusterUpgradeOptions", {})
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade" or not options.get("gatewayClassName"):
        yield f"upgradeStrategy is {strategy}"
    elif not 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100:
        yield f"steps of {options['stepSizePercent']} % in a surge of {options['maxSurgePercent']} %"


def the_operator_takes_it(cluster: Cluster) -> Iterator[str]:
    """What KubeRay refuses after Kubernetes has taken it: controllers/ray/utils/validation.go."""
    [service] = cluster.of_kind("RayService")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,39}[a-z0-9])?", service["metadata"]["name"]):
        yield f"the service's name is {service['metadata']['name']}"
    for pod in cluster.pods:
        params, env = pod.group["rayStartParams"], pod.container.get("env", [])
        if "labels" in params:
            yield f"{pod.name}: labels stand beside rayStartParams, not in them"
        if pod.group.get("resources") and params.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield f"{pod.name}: resources stand in rayStartParams, and beside them"
        if params.keys() & {"redis-username", "redis-password"}:
            yield f"{pod.name}: Redis is told of in gcsFaultToleranceOptions"
        if any(each["name"] in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME") for each in env):
            yield f"{pod.name}: Redis is told of in gcsFaultToleranceOptions"
    is_incremental = (
        cluster.service.get("upgradeStrategy", {}).get("type") == "NewClusterWithIncrementalUpgrade"
    )
    if is_incremental and not cluster.ray.get("enableInTreeAutoscaling"):
        yield "an incremental upgrade needs the autoscaler"


def pods_drain_longer_than_a_picture(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.workers:
        stop = pod.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])[-1]
        told = _DRAINS.fullmatch(stop)
        if told is None or int(told[1]) != 2 * int(told[2]):
            yield f"{pod.name}: preStop does not drain: {stop}"
            continue
        models = [each for each in cluster.models.values() if pod in cluster.group_of(each.node_labels)]
        longest = max((each.drain_s for each in models), default=0)
        if int(told[1]) < longest:
            yield f"{pod.name}: drains for {told[1]} s, a picture may take {longest:.0f} s"
        if pod.spec.get("terminationGracePeriodSeconds", 30) < int(told[1]) + KEPT_S:
            yield f"{pod.name}: is killed before it has drained"


def probes_exist(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        wanted = {
            "livenessProbe": "/api/local_raylet_healthz",
            "readinessProbe": "/api/gcs_healthz" if pod.is_head else "/-/healthz",
        }
        for probe, path in wanted.items():
            asked = pod.container.get(probe, {}).get("httpGet", {})
            if asked.get("path") != path or asked["port"] not in {*pod.ports(), 52365}:
                yield f"{pod.name}: {probe} asks {asked}"


def the_network_is_closed(cluster: Cluster) -> Iterator[str]:
    """To whoever is not the operator, Prometheus or a gateway; those reach what is theirs."""
    sources: dict[str, tuple[dict[str, str], dict[str, str]]] = {
        "a stranger": (STRANGER, {"kubernetes.io/metadata.name": "elsewhere"}),
        "a stranger in the namespace": (STRANGER, {}),
        "a gateway": (
            {"gateway.networking.k8s.io/gateway-name": "x"},
            {"kubernetes.io/metadata.name": "istio"},
        ),
    }
    for pod in cluster.pods:
        for who, (labels, namespace) in sources.items():
            for port in RAY_PORTS:
                if cluster.lets_in(pod, port, labels, namespace):
                    yield f"{who} reaches port {port} of {pod.name}"
        monitoring: dict[str, str] = {"kubernetes.io/metadata.name": "monitoring"}
        if not cluster.lets_in(pod, 8080, STRANGER, monitoring):
            yield f"Prometheus does not reach {pod.name}"
        if cluster.lets_in(pod, 8265, STRANGER, monitoring):
            yield f"Prometheus reaches the dashboard of {pod.name}"
        if not cluster.lets_in(pod, 6379, cluster.head.labels, {}):
            yield f"{pod.name} is closed to Ray itself"
    operator: dict[str, str] = {"app.kubernetes.io/name": "kuberay-operator"}
    if not cluster.lets_in(cluster.head, 8265, operator, {"kubernetes.io/metadata.name": "kuberay-system"}):
        yield "the operator does not reach the head"
    if any(cluster.lets_in(each, 8000, *sources["a stranger"]) for each in cluster.pods):
        yield "a stranger calls without the gateway"
    if not all(cluster.lets_in(each, 8000, *sources["a gateway"]) for each in cluster.workers):
        yield "the gateway reaches no worker"


def metadata_is_out_of_reach(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        for address in METADATA:
            if any(cluster.lets_out(pod, address, port) for port in (80, 443, 6379, 5432, 8080)):
                yield f"{pod.name} reaches {address}"
    for pod in cluster.workers:
        for address in INSIDE:
            if any(cluster.lets_out(pod, address, port) for port in (80, 443, 6443, 8080, 10250)):
                yield f"{pod.name} reaches {address}"
        if not cluster.lets_out(pod, "93.184.215.14", 443):
            yield f"{pod.name} does not reach the internet"


def models_fit_their_nodes(cluster: Cluster) -> Iterator[str]:
    wanted: dict[str, list[tuple[float, float, str]]] = {pod.name: [] for pod in cluster.workers}

    def book(labels: dict[str, str], gpus: float, cpus: float, times: int, who: str) -> Iterator[str]:
        groups = cluster.group_of(labels)
        if len(groups) != 1:
            yield f"{who}: {labels} means {len(groups)} groups of nodes"
        for pod in groups[:1]:
            wanted[pod.name] += [(gpus, cpus, who)] * times

    yield from book(
        cluster.front.node_labels, 0, _front_cpus(), cluster.front.gateway_replicas + 1, "the front"
    )
    for name, model in cluster.models.items():
        yield from book(model.node_labels, model.num_gpus, model.num_cpus, model.max_replicas, name)
        yield from book(model.entry_node_labels, 0, 0, 1, f"the entry of {name}")
        has_gpu = any(pod.gpus for pod in cluster.group_of(model.node_labels))
        if (model.device != "cpu") != has_gpu or (model.num_gpus > 0) != has_gpu:
            yield f"{name}: {model.device}, {model.num_gpus} GPUs; nodes have {'some' if has_gpu else 'none'}"
    for pod in cluster.workers:
        yield from _packed(pod, sorted(wanted[pod.name], reverse=True))


def _packed(pod: Pod, wanted: list[tuple[float, float, str]]) -> Iterator[str]:
    """What finds no room, when every node of the group is there."""
    cpus = float(pod.container["resources"]["limits"]["cpu"])
    nodes = [[float(pod.gpus), cpus] for _ in range(pod.group["maxReplicas"])]
    for gpu, cpu, who in wanted:
        room = next((each for each in nodes if each[0] >= gpu - 1e-9 and each[1] >= cpu - 1e-9), None)
        if room is None:
            yield f"{who} finds no room for {gpu} GPUs and {cpu} CPUs on {pod.name}"
        else:
            room[0] -= gpu
            room[1] -= cpu


def _front_cpus() -> float:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Ray's use of pydantic
        from deployments.app import FRONT_CPUS
    return FRONT_CPUS


def memory_is_what_was_asked_for(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        for name, container in containers(pod, cluster):
            resources = container.get("resources", {})
            if not resources.get("requests") or resources.get("requests") != resources.get("limits"):
                yield f"{name}: {resources}"


def budgets_select_pods(cluster: Cluster) -> Iterator[str]:
    if not cluster.of_kind("PodDisruptionBudget"):
        yield "there is no budget"
    for budget in cluster.of_kind("PodDisruptionBudget"):
        spec, name = budget["spec"], budget["metadata"]["name"]
        selected = [pod for pod in cluster.pods if matches(spec["selector"], pod.labels)]
        least = spec.get("minAvailable")
        if not isinstance(least, int):  # Kubernetes cannot count what KubeRay's pods should be
            yield f"{name}: minAvailable is {least}"
        elif not selected or any(pod.group.get("minReplicas", 1) <= least for pod in selected):
            yield f"{name}: selects {[pod.name for pod in selected]}; no node could be drained, or any"


def secrets_are_references(cluster: Cluster) -> Iterator[str]:
    if cluster.of_kind("Secret"):
        yield "a Secret is among the manifests"
    for pod in cluster.pods:
        for name, container in containers(pod, cluster):
            for each in container.get("env", []):
                if re.search(r"PASSWORD|SECRET|TOKEN|KEYS?$", each["name"]) and "value" in each:
                    yield f"{name}: {each['name']} is written out"
    if re.search(r"://[^/\s]*:[^/\s]*@|password", cluster.service["serveConfigV2"], re.IGNORECASE):
        yield "the configuration has a password"


def secrets_are_documented(cluster: Cluster) -> Iterator[str]:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    for name in sorted(secrets(cluster)):
        if f"create secret generic {name} " not in page:
            yield f"nothing says how {name} is made"


def secrets(cluster: Cluster) -> set[str]:
    """The names of all Secrets that are asked for."""
    text = repr(cluster.of_kind("RayService"))
    inside = re.findall(r"'(?:secretRef|secretKeyRef)': \{[^}]*'name': '([^']+)'", text)
    return {*inside, *re.findall(r"'secretName': '([^']+)'", text)}


def volumes_exist(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        volumes = {each["name"]: each for each in pod.spec.get("volumes", [])}
        for name, container in containers(pod, cluster):
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{name}: no volume {mount['name']}"
        for volume in volumes.values():
            claim, config = volume.get("persistentVolumeClaim"), volume.get("configMap")
            if claim and claim["claimName"] not in cluster.names("PersistentVolumeClaim"):
                yield f"{pod.name}: no claim {claim['claimName']}"
            if config and config["name"] not in cluster.names("ConfigMap"):
                yield f"{pod.name}: no ConfigMap {config['name']}"


def what_is_written_has_a_place(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        mounted = _folders(pod, writable=True)
        for folder in ("/tmp", "/home/darkroom"):
            if folder not in mounted:
                yield f"{pod.name}: {folder} cannot be written"
    front = cluster.front
    yield from _placed(cluster, front.node_labels, [front.files_url, front.queue_url], writable=True)
    yield from _placed(cluster, front.node_labels, [front.webhooks.keys], writable=False)
    for model in cluster.models.values():
        yield from _placed(cluster, model.node_labels, [model.files_url, model.weights.cache], writable=True)


def _placed(cluster: Cluster, labels: dict[str, str], urls: list[str], *, writable: bool) -> Iterator[str]:
    for pod in cluster.group_of(labels):
        for url in urls:
            scheme, _, path = url.partition("://")
            if scheme not in ("file", "sqlite"):
                continue
            above = {str(each) for each in PurePosixPath(f"/{path.lstrip('/')}").parents} | {path}
            if not above & _folders(pod, writable=writable):
                yield f"{pod.name}: nothing is mounted for {url}"


def _folders(pod: Pod, *, writable: bool) -> set[str]:
    mounts = pod.container.get("volumeMounts", [])
    return {each["mountPath"] for each in mounts if not (writable and each.get("readOnly"))}


def every_ray_process_has_the_environment(cluster: Cluster) -> Iterator[str]:
    [data] = [
        each["data"]
        for each in cluster.of_kind("ConfigMap")
        if each["metadata"]["name"] == "darkroom-environment"
    ]
    if data != CLUSTER_ENVIRONMENT:
        yield f"darkroom-environment differs in {sorted(dict(data.items() ^ CLUSTER_ENVIRONMENT.items()))}"
    for pod in cluster.pods:
        if {"configMapRef": {"name": "darkroom-environment"}} not in pod.container.get("envFrom", []):
            yield f"{pod.name}: has no darkroom-environment"


def monitors_find_ports(cluster: Cluster) -> Iterator[str]:
    for monitor in cluster.of_kind("PodMonitor"):
        selected = [pod for pod in cluster.pods if matches(monitor["spec"]["selector"], pod.labels)]
        if len(selected) != len(cluster.pods):
            yield f"{monitor['metadata']['name']}: selects {[pod.name for pod in selected]}"
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if not any(endpoint["port"] in pod.ports() for pod in selected):
                yield f"{monitor['metadata']['name']}: nobody has a port {endpoint['port']}"
    if missing := [pod.name for pod in cluster.pods if "metrics" not in pod.ports()]:
        yield f"{missing} have no port for metrics"


EVERYWHERE: tuple[Policy, ...] = (
    the_head_has_no_gpu,
    the_head_takes_no_work,
    images_are_pinned,
    nobody_is_root,
    nobody_speaks_to_kubernetes,
    ray_wants_a_token,
    the_autoscaler_is_v2,
    the_operator_takes_it,
    pods_drain_longer_than_a_picture,
    probes_exist,
    the_network_is_closed,
    metadata_is_out_of_reach,
    models_fit_their_nodes,
    memory_is_what_was_asked_for,
    secrets_are_references,
    secrets_are_documented,
    volumes_exist,
    what_is_written_has_a_place,
    every_ray_process_has_the_environment,
    monitors_find_ports,
)
IN_PRODUCTION: tuple[Policy, ...] = (
    *EVERYWHERE,
    the_heads_state_survives,
    upgrades_are_incremental,
    budgets_select_pods,
)
