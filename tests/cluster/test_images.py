"""The Dockerfile and what compose makes of it: no daemon is at hand, so they are read."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.server import ROOT

DOCKERFILE = ROOT / "cluster" / "Dockerfile"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "compose" / "compose.yaml").read_text())


def stages() -> dict[str, list[list[str]]]:
    """The instructions of each stage, split at blanks."""
    found: dict[str, list[list[str]]] = {}
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    for line in text.splitlines():
        if line.startswith("FROM "):
            found[line.split()[-1]] = []
        if found and line and not line.startswith("#"):
            found[next(reversed(found))].append(line.split())
    return found


def lineage(target: str) -> list[list[str]]:
    """The instructions of a target and of the stages that it stands on."""
    own = stages()[target]
    below = own[0][1]
    return [*(lineage(below) if below in stages() else []), *own]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed")
    told = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, "")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_t35_an_image_stands_on_an_exact_version_and_runs_as_nobody(target: str) -> None:
    lines = lineage(target)
    assert lines[0][1] == "python:${PYTHON}${PYTHON_DIGEST}"
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-slim-bookworm$", DOCKERFILE.read_text(), re.MULTILINE)
    [user] = [words[1] for words in lines if words[0] == "USER"]
    assert user == "10001:10001"
    assert [words for words in lines if words[0] in ("ADD", "VOLUME")] == []


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_t35_every_package_of_an_image_is_known_by_its_hash(kind: str) -> None:
    packages, ours = [" ".join(each) for each in lineage(f"build-{kind}") if "pip install" in " ".join(each)]
    for word in ("--require-hashes", "--only-binary :all:", f"-r torch-{kind}.lock", "-r requirements.lock"):
        assert word in packages
    assert ours.endswith("--no-index --no-deps --no-build-isolation .")
    lock = (ROOT / "cluster" / f"torch-{kind}.lock").read_text().replace("\\\n", " ")
    entries = [line for line in lock.splitlines() if line and not line.startswith("#")]
    assert {"setuptools", "torch"} <= {each.partition("==")[0] for each in entries}
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9-]+==\S+(\s+--hash=sha256:[0-9a-f]{64})+\s*", entry), entry


def test_the_locks_of_the_images_have_no_package_twice() -> None:
    names = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==", re.MULTILINE)
    shared = set(names.findall((ROOT / "requirements.lock").read_text()))
    for kind in ("cpu", "cuda"):
        own = names.findall((ROOT / "cluster" / f"torch-{kind}.lock").read_text())
        assert shared & set(own) == set()


def test_the_torch_of_the_images_is_the_one_that_is_tested() -> None:
    [tested] = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for kind in ("cpu", "cuda"):
        lock = (ROOT / "cluster" / f"torch-{kind}.lock").read_text()
        assert re.search(rf"^torch=={re.escape(tested)}(\+cpu)? ", lock, re.MULTILINE)


def test_all_that_an_image_copies_is_there_and_is_let_through() -> None:
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {
        name
        for lines in stages().values()
        for words in lines
        if words[0] == "COPY" and not words[1].startswith("--from")
        for name in words[1:-1]
    }
    assert copied == let_through
    assert [name for name in sorted(copied) if not (ROOT / name).exists()] == []


def test_t35_nothing_of_the_images_names_where_packages_come_from() -> None:
    for path in (ROOT / "cluster").rglob("*"):
        if path.is_file():
            assert not re.search(r"pythonhosted|pypi\.org|--trusted-host", path.read_text()), path


def test_compose_runs_what_the_dockerfile_makes_locked_down() -> None:
    darkroom = COMPOSE["services"]["darkroom"]
    assert darkroom["build"]["target"] in stages()
    assert (ROOT / "cluster" / "compose" / darkroom["build"]["context"]).resolve() == ROOT
    assert (darkroom["read_only"], darkroom["cap_drop"]) == (True, ["ALL"])
    assert all(each["security_opt"] == ["no-new-privileges:true"] for each in COMPOSE["services"].values())
    assert all("healthcheck" in each for each in COMPOSE["services"].values())
    assert [each for each in darkroom["ports"] if not each.startswith("127.0.0.1:")] == []


def test_composes_secrets_are_files_that_git_does_not_see() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
    assert "/cluster/compose/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    used = {name for each in COMPOSE["services"].values() for name in each["secrets"]}
    assert used == set(COMPOSE["secrets"])
    environment = [each.get("environment", {}) for each in COMPOSE["services"].values()]
    assert not any(re.search("PASSWORD$|KEY", name) for each in environment for name in each)


def test_what_compose_mounts_is_there_and_what_is_written_has_a_place() -> None:
    darkroom = COMPOSE["services"]["darkroom"]
    mounts = [each.split(":") for each in darkroom["volumes"]]
    config = next(source for source, target, *_ in mounts if target == "/etc/darkroom/serve_config.yaml")
    served = yaml.safe_load((ROOT / "cluster" / "compose" / config).read_text())
    folders = {target for _, target, *_ in mounts} | {each.partition(":")[0] for each in darkroom["tmpfs"]}
    assert {"/tmp", "/home/darkroom", "/data", "/cache"} <= folders
    paths = re.findall(r"file://(/[a-z]+)", yaml.safe_dump(served))
    assert paths and set(paths) <= folders
    longest = max(app["args"].get("drain_s", 120) for app in served["applications"])
    assert int(darkroom["stop_grace_period"].removesuffix("s")) >= longest + 30


def test_docker_itself_reads_compose_where_it_is_installed() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    folder = ROOT / "cluster" / "compose"
    told = subprocess.run(
        [docker, "compose", "config", "--quiet"], cwd=folder, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
