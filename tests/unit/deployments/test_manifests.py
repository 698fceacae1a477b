"""How a place's differences are put into the configuration."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import manifests, server
from tests.support.server import ROOT

WHOLE: dict[str, Any] = {
    "http_options": {"host": "127.0.0.1", "port": 8000},
    "applications": [
        {"name": "a", "args": {"kept": 1, "changed": 2, "many": ["x", "y"]}},
        {"name": "b", "args": {"kept": 3}},
    ],
}


def test_what_is_not_named_stays_and_lists_of_named_things_merge_by_name() -> None:
    differences = {"applications": [{"name": "a", "args": {"changed": None, "many": [], "new": {"deep": 1}}}]}
    assert manifests.merge(WHOLE, differences) == {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {"name": "a", "args": {"kept": 1, "changed": None, "many": [], "new": {"deep": 1}}},
            {"name": "b", "args": {"kept": 3}},
        ],
    }


def test_a_name_that_is_nobodys_is_told() -> None:
    with pytest.raises(ValueError, match="nothing is named c; known: a, b"):
        manifests.merge(WHOLE, {"applications": [{"name": "c"}]})


def test_a_mistake_in_a_places_file_is_told_with_that_file(tmp_path: Path) -> None:
    place = tmp_path / "overlays" / "mine"
    place.mkdir(parents=True)
    wrong = {"applications": [{"name": "flux", "args": {"num_gpu": 1}}]}
    (place / manifests.CONFIG).write_text(yaml.safe_dump(wrong))
    with pytest.raises(ValueError, match="mine/serve_config.yaml: application flux: num_gpu"):
        manifests.written(tmp_path, ROOT / "serve_config.yaml")


@pytest.mark.parametrize(
    ("path", "content"),
    manifests.written(ROOT / "cluster", ROOT / "serve_config.yaml").items(),
    ids=lambda value: str(value.relative_to(ROOT)) if isinstance(value, Path) else "",
)
def test_what_is_generated_is_up_to_date(path: Path, content: str) -> None:
    assert path.read_text() == content, "run `darkroom manifests`"


def test_nothing_else_lies_among_it() -> None:
    lies = {path for path in (ROOT / "cluster").rglob("generated/*") if path.is_file()}
    assert lies == set(manifests.written(ROOT / "cluster", ROOT / "serve_config.yaml"))


def test_a_cluster_differs_from_one_machine_in_how_long_it_drains_only() -> None:
    differ = {
        name
        for name in server.CLUSTER_ENVIRONMENT.keys() | server.DEFAULT_ENVIRONMENT.keys()
        if server.CLUSTER_ENVIRONMENT.get(name) != server.DEFAULT_ENVIRONMENT.get(name)
    }
    assert differ == {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"}
