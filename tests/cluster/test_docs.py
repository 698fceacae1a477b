"""What the pages say is so: commands, names and files that they mention exist."""

import re
import subprocess

import pytest
from typer.main import get_command

from deployments.cli import app
from tests.cluster.conftest import OVERLAYS
from tests.support.cluster import Cluster
from tests.support.kustomize import rendered
from tests.support.policies import secrets
from tests.support.server import ROOT

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("kubernetes", "runbook")}
TEXT = "\n".join(PAGES.values())
ALERTS = (
    "DarkroomQueueStuck",
    "DarkroomNoWorker",
    "DarkroomHighWait",
    "DarkroomErrorRate",
    "DarkroomWebhookFailures",
    "DarkroomDiskLow",
    "DarkroomDatabaseDown",
    "DarkroomGpuMemoryHigh",
    "DarkroomReplicaCrashLoop",
)


def sections() -> dict[str, str]:
    _, *parts = PAGES["runbook"].split("\n## ")
    return {part.partition("\n")[0]: part for part in parts}


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_it_means_where_to_look_and_what_to_do(alert: str) -> None:
    for word in ("**Means**", "**Look**", "**Do**"):
        assert word in sections()[alert]


def test_the_runbook_has_every_alert_and_no_other() -> None:
    rules = "\n".join(path.read_text() for path in (ROOT / "cluster").glob("observability/**/*.yaml"))
    alerts = set(re.findall(r"^\s*-? *alert: *(\w+)", rules, re.MULTILINE))
    assert set(sections()) == set(ALERTS) | alerts
    assert set(re.findall(r"\bDarkroom[A-Z]\w+", TEXT)) <= set(sections())


def test_every_command_of_ours_exists() -> None:
    command = get_command(app)
    known = set(command.commands)  # type: ignore[attr-defined]
    groups = {name: set(getattr(command.commands[name], "commands", {})) for name in known}  # type: ignore[attr-defined]
    used = re.findall(r"\bdarkroom ([a-z]+)(?: ([a-z]+))?", TEXT)
    found = [(first, second) for first, second in used if first in known]
    assert {"manifests", "keys", "webhooks", "migrate"} <= {first for first, _ in found}
    assert [each for each in found if groups[each[0]] and each[1] not in groups[each[0]]] == []


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_secrets_that_are_made_are_asked_for(name: str) -> None:
    made = set(re.findall(r"create secret generic (\S+)", PAGES["kubernetes"]))
    asked = secrets(Cluster(rendered(OVERLAYS / name)))
    assert asked <= made
    if name == "prod":
        assert made == asked


def test_files_and_policies_that_are_named_exist() -> None:
    for path in re.findall(r"\bcluster/[a-z0-9/._-]+[a-z]", TEXT):
        assert path.startswith("cluster/overlays/mine") or (ROOT / path).exists(), path
    policies = Cluster(rendered(OVERLAYS / "prod")).names("NetworkPolicy")
    for name in re.findall(r"(?:policy|delete|in) `(darkroom-[a-z]+)`", TEXT):
        assert name in policies | {"darkroom-postgres", "darkroom-webhook-keys"}, name


@pytest.mark.parametrize("name", PAGES)
def test_a_shell_reads_what_is_to_be_typed(name: str) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGES[name], re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        told = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert (told.returncode, told.stderr) == (0, ""), block
