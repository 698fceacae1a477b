"""docs/how-to/add-an-endpoint.md, followed to the letter in a copy of the project, without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from examples import add_endpoint

STICKER = "acme/flux/sticker"
FIELDS = {"prompt": "a red circle", "background": "pink", "side": 96, "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy, with what the page adds."""
    folder: Path = tmp_path_factory.mktemp("project") / "darkroom"
    add_endpoint.copied(folder)
    files = add_endpoint.followed(add_endpoint.PAGE, folder)
    assert len(files) == 5
    return folder


def python(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: each for name, each in os.environ.items() if not name.startswith("COVERAGE")}
    environment["PYTHONPATH"] = str(project)  # `make coverage` measures ours and not the copy
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_it_draws_what_is_asked_for_and_names_a_wrong_field(project: Path, tmp_path: Path) -> None:
    requests = [json.dumps(FIELDS), json.dumps(FIELDS | {"side": 9})]
    done = python(project, "-m", "tests.support.asking", str(tmp_path), STICKER, *requests)
    assert done.returncode == 0, done.stderr
    drawn, refused = map(json.loads, done.stdout.splitlines())
    assert drawn["status"] == 200, drawn
    assert (drawn["body"]["seed"], drawn["body"]["prompt"]) == (3, "a red circle")
    with Image.open(tmp_path / "picture") as picture:
        assert (picture.format, picture.size) == ("PNG", (96, 96))
    assert (refused["status"], refused["body"]["detail"][0]["loc"]) == (422, ["body", "side"])


def test_its_own_tests_and_those_of_the_contract_pass(project: Path) -> None:
    done = python(
        project,
        *("-m", "pytest", "-p", "no:cacheprovider", "-k", "sticker"),
        *("tests/unit/pipelines/test_acme_flux_sticker.py", "tests/unit/pipelines/test_fields.py"),
        "tests/unit/schemas",
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_the_configuration_serves_it(project: Path) -> None:
    front, flux, *_ = yaml.safe_load((project / "serve_config.yaml").read_text())["applications"]
    catalogue = front["deployments"][0]["user_config"]["models"]
    assert STICKER in catalogue["flux"]["endpoints"] and STICKER in flux["args"]["endpoints"]
