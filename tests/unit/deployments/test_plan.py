"""`darkroom plan`: what fits where, before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deployments.cli import app
from tests.support.server import ROOT

SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())


@pytest.fixture
def config(tmp_path: Path, flux_folder: Path) -> Path:
    """One model, on half of a GPU."""
    config = json.loads(json.dumps(SHIPPED))
    front, flux, *_ = config["applications"]
    flux["args"] |= {"model": str(flux_folder), "device": "cuda", "num_gpus": 0.5}
    flux["args"] |= dict.fromkeys(("redux", "depth", "safety_checker"))
    config["applications"] = [front, flux]
    for deployment in front["deployments"]:
        deployment["user_config"]["models"] = {"flux": deployment["user_config"]["models"]["flux"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def plan(config: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["plan", "--config", str(config), *options])
    return done.exit_code, " ".join(done.output.split())


def test_without_a_gpu_it_says_what_is_needed(config: Path) -> None:
    code, said = plan(config)
    assert code == 0
    assert "on its 0.5 GPU" in said
    for part in ("weights model/transformer", "peaks forward", "peaks decode", "at most LoRA bank"):
        assert part in said


def test_with_the_size_of_a_gpu_it_gives_a_verdict(config: Path) -> None:
    code, said = plan(config, "--gpu-gib", "80")
    assert code == 0
    assert "fits 40.00 GiB, which is 0.5 of the GPU" in said


def test_what_does_not_fit_is_an_error(config: Path) -> None:
    code, said = plan(config, "--gpu-gib", "0.25")
    assert code == 1
    assert "NoRoom" in said and "does not fit" in said and "Raise num_gpus" in said
