"""Alerts and the dashboard ask for metrics that exist, by labels that those have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import metrics

PLACE = Path(__file__).parents[2] / "cluster" / "observability"
RULES = yaml.safe_load((PLACE / "alerts.yaml").read_text())["spec"]["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((PLACE / "dashboard.json").read_text())

OURS = {f"ray_{each.name}": each for each in vars(metrics).values() if isinstance(each, metrics.Metric)}
SERVES = {"application", "deployment", "replica"}  # labels that Serve adds to all of them
OTHERS = {  # of Ray Serve and the kubelet
    "ray_serve_deployment_replica_healthy": SERVES,
    "ray_serve_deployment_replica_starts_total": SERVES,
    "kubelet_volume_stats_available_bytes": {"namespace"},
    "kubelet_volume_stats_capacity_bytes": {"namespace"},
}

EXPRESSIONS = {rule["alert"]: rule["expr"] for rule in RULES} | {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}


def metric(name: str) -> tuple[str, set[str]]:
    """The metric that a series belongs to, and the labels that the series has."""
    if name in OTHERS:
        return name, OTHERS[name]
    parts = re.match(r"(.*?)(_bucket|_count|_sum)?$", name)
    assert parts is not None
    base = parts[1] if parts[1] in OURS and OURS[parts[1]].kind == "histogram" else name
    assert base in OURS, f"there is no {name}"
    assert (base != name) == (OURS[base].kind == "histogram"), f"{name} is no series of {base}"
    return base, {*OURS[base].labels, *SERVES, *(["le"] if name.endswith("_bucket") else [])}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_asks_for_what_there_is(name: str) -> None:
    expression = EXPRESSIONS[name]
    series = re.findall(r"\b((?:ray|kubelet)_\w+)(?:\{([^}]*)\})?", expression)
    assert series
    known = set.union(*(metric(each)[1] for each, _ in series)) | {"model"}
    for each, selector in series:
        labels = metric(each)[1]
        assert set(re.findall(r"(\w+)(?:=~|!=|!~|=)", selector)) <= labels, each
    grouped = {
        label for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in group.split(", ")
    }
    assert grouped <= known
    assert expression.count("(") == expression.count(")")


def test_every_metric_of_ours_is_shown() -> None:
    shown = {
        metric(each)[0] for text in EXPRESSIONS.values() for each in re.findall(r"\bray_darkroom_\w+", text)
    }
    assert shown == set(OURS)


def test_the_dashboard_can_be_imported_anywhere() -> None:
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "model"}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_waits_and_says_what_is_wrong(rule: dict[str, Any]) -> None:
    assert rule["for"].endswith("m")
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"].endswith(".")
