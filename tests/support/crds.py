"""KubeRay's own CustomResourceDefinitions as schemas, which refuse what they do not know, as `kubectl` does.

They are no part of this repository: `../shared/kuberay/crds` beside it, or the folder in KUBERAY_CRDS, for
example the `crds` of an unpacked chart `kuberay-operator`.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from tests.support.server import ROOT


def folder() -> Path | None:
    """Where the definitions are, if they are anywhere."""
    beside = ROOT.parent / "shared" / "kuberay" / "crds"
    path = Path(os.environ.get("KUBERAY_CRDS", beside))
    return path if path.is_dir() else None


def errors(manifest: dict[str, Any], crds: Path) -> list[str]:
    """What is wrong with a resource of KubeRay's, with the place."""
    validator = _validator(crds / f"ray.io_{manifest['kind'].lower()}s.yaml", manifest["apiVersion"])
    return [f"{each.json_path}: {each.message[:200]}" for each in validator.iter_errors(manifest)]


@cache
def _validator(path: Path, api_version: str) -> Draft202012Validator:
    definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    version = api_version.partition("/")[2]
    versions = {each["name"]: each["schema"]["openAPIV3Schema"] for each in definition["spec"]["versions"]}
    kind = extend(Draft202012Validator, {"x-kubernetes-list-map-keys": _no_duplicates})
    return kind(_strict(versions[version]))


def _strict(schema: Any) -> Any:
    """Structural schemas drop unknown fields; here they are wrong."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _strict(value) for name, value in schema.items()}
    is_closed = isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema
    if is_closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


def _no_duplicates(_: Any, keys: list[str], items: Any, __: Any) -> Iterator[ValidationError]:
    known = [tuple(each.get(key) for key in keys) for each in items]
    for each in sorted({repr(each) for each in known if known.count(each) > 1}):
        yield ValidationError(f"{each} is there twice")
