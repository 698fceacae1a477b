"""What the manifests in cluster/ take from the code and from serve_config.yaml, so that both say the same.

Each place, an overlay or the one of compose, has a `serve_config.yaml` of its own with what differs there. It
has the form of the configuration itself; lists of things with a `name` are merged by it, the rest replaced.
"""

from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from deployments import server

MADE_BY = "# Written by `darkroom manifests`; change what it says there.\n"
CONFIG = "serve_config.yaml"
GENERATED = "generated"
SERVICE = "darkroom"  # the RayService


def written(root: Path, config: Path) -> dict[Path, str]:
    """Every file that belongs below `root` with its content.

    Raises ValueError for settings that would be refused, and for differences that are no configuration.
    """
    files = {root / "base" / GENERATED / "environment.yaml": environment()}
    for differences in places(root):
        merged = merge(server.read_config(config), server.read_config(differences))
        try:
            server.check_config(merged)
        except ValueError as error:
            raise ValueError(f"{differences}: {error}") from None
        made = differences.parent / GENERATED
        if (differences.parent / "kustomization.yaml").exists():
            files[made / "rayservice.yaml"] = service_patch(merged)
            files[made / "config.yaml"] = config_map(merged)
        else:
            files[made / CONFIG] = MADE_BY + dumped(merged)
    return files


def places(root: Path) -> Iterator[Path]:
    """The files of differences: of each overlay, and of compose."""
    yield from sorted(root.glob(f"overlays/*/{CONFIG}"))
    yield from sorted(root.glob(f"compose/{CONFIG}"))


def environment() -> str:
    """The variables that every Ray process needs, as a ConfigMap."""
    head = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "darkroom-environment"}}
    return MADE_BY + dumped({**head, "data": server.CLUSTER_ENVIRONMENT})


def service_patch(config: dict[str, Any]) -> str:
    """What gives the RayService its Serve configuration."""
    return f"""{MADE_BY}apiVersion: ray.io/v1
kind: RayService
metadata:
  name: {SERVICE}
spec:
  serveConfigV2: |
{indent(dumped(config), "    ")}"""


def config_map(config: dict[str, Any]) -> str:
    """The same configuration as a file in the pods, for the operator's commands there."""
    return f"""{MADE_BY}apiVersion: v1
kind: ConfigMap
metadata:
  name: darkroom-config
data:
  {CONFIG}: |
{indent(dumped(config), "    ")}"""


def merge(whole: Any, differences: Any) -> Any:
    """`whole` with the differences put in. Raises ValueError for what names nothing that is there."""
    if isinstance(whole, dict) and isinstance(differences, dict):
        return whole | {name: merge(whole.get(name), value) for name, value in differences.items()}
    if _are_named(whole) and _are_named(differences):
        known = {each["name"]: each for each in whole}
        if strangers := [each["name"] for each in differences if each["name"] not in known]:
            raise ValueError(f"nothing is named {', '.join(strangers)}; known: {', '.join(known)}")
        merged = {each["name"]: merge(known[each["name"]], each) for each in differences}
        return list((known | merged).values())
    return differences


def _are_named(value: Any) -> bool:
    return (
        isinstance(value, list)
        and value != []
        and all(isinstance(each, dict) and "name" in each for each in value)
    )


class _Plain(yaml.SafeDumper):
    """Writes what is there twice twice: aliases are for people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dumped(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Plain, sort_keys=False, width=110, allow_unicode=True)
