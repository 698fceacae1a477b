"""`kubectl kustomize` for what cluster/ uses of it, for machines without kubectl.

That is resources, namespace, images, and patches, as merges and as operations. The rest it refuses. A test
compares it with what kubectl renders.
"""

import json
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

_KNOWN = {"apiVersion", "kind", "namespace", "resources", "patches", "images"}
_WITHOUT_NAMESPACE = ("Namespace", "PersistentVolume", "ClusterRole", "ClusterRoleBinding")


def rendered(folder: Path) -> list[Manifest]:
    """The manifests of a folder with a kustomization.yaml. Raises ValueError for what is not known here."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(kustomization) - _KNOWN:
        raise ValueError(f"{folder}: {sorted(unknown)} is not known here")
    manifests: list[Manifest] = []
    for name in kustomization["resources"]:
        path = folder / name
        manifests += rendered(path) if path.is_dir() else documents(path)
    for patch in kustomization.get("patches", []):
        manifests = _patched(manifests, patch, folder)
    for manifest in manifests:
        if manifest["kind"] not in _WITHOUT_NAMESPACE and "namespace" in kustomization:
            manifest["metadata"]["namespace"] = kustomization["namespace"]
        for image in kustomization.get("images", []):
            _set_image(manifest, image)
    return manifests


def documents(path: Path) -> list[Manifest]:
    """Without what aliases make one object at two places: a patch of one would be a patch of both."""
    loaded = yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader)
    return [json.loads(json.dumps(each)) for each in loaded if each is not None]


def _patched(manifests: list[Manifest], patch: dict[str, Any], folder: Path) -> list[Manifest]:
    if unknown := set(patch) - {"path", "target"}:
        raise ValueError(f"{folder}: a patch with {sorted(unknown)} is not known here")
    [first, *others] = documents(folder / patch["path"])
    if isinstance(first, list):
        [target] = [each for each in manifests if _is(each, patch["target"]["kind"], patch["target"]["name"])]
        for operation in first:
            _operate(target, operation)
        return manifests
    for merge in (first, *others):
        target = next(each for each in manifests if _is(each, merge["kind"], merge["metadata"]["name"]))
        if merge.get("$patch") == "delete":
            manifests = [each for each in manifests if each is not target]
        else:
            _merge(target, merge)
    return manifests


def _is(manifest: Manifest, kind: str, name: str) -> bool:
    return bool(manifest["kind"] == kind and manifest["metadata"]["name"] == name)


def _merge(target: dict[str, Any], patch: dict[str, Any]) -> None:
    for name, value in patch.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge(target[name], value)
        else:
            target[name] = value


def _operate(target: Any, operation: dict[str, Any]) -> None:
    *parents, last = operation["path"].lstrip("/").split("/")
    for each in parents:
        target = target[int(each) if isinstance(target, list) else each]
    place = int(last) if isinstance(target, list) else last
    if operation["op"] == "remove":
        del target[place]
    elif operation["op"] == "replace" and target[place] is not None:
        target[place] = operation["value"]
    else:
        raise ValueError(f"{operation['op']} is not known here")


def _set_image(value: Any, image: dict[str, str]) -> None:
    """In every list of containers, however deep, as kustomize does it."""
    if isinstance(value, list):
        for each in value:
            _set_image(each, image)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name in ("containers", "initContainers"):
                for container in inner:
                    if container["image"].partition(":")[0] == image["name"]:
                        container["image"] = f"{image['newName']}:{image['newTag']}"
            else:
                _set_image(inner, image)
