"""Configuration files: what is wrong is said before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import server
from tests.support.server import ROOT

SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())


def test_the_shipped_file_loads_and_the_address_can_be_replaced() -> None:
    config = server.load_config(ROOT / "serve_config.yaml", "127.0.0.2", 8123)
    assert server.address(config) == "http://127.0.0.2:8123"


def test_an_empty_http_options_has_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SHIPPED | {"http_options": None}))
    assert server.address(server.load_config(path, None, None)) == "http://127.0.0.1:8000"


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "applications: 5", "\t{"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="config.yaml"):
        server.load_config(path, None, None)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not YAML"):
        server.load_config(path, None, None)


@pytest.mark.parametrize(
    ("app", "changes", "named"),
    [
        (0, {"args": {"que_url": "x"}}, "application darkroom: que_url"),
        (1, {"args": {"model": "zoo:flux", "endpoints": ["fal-ai/nope"]}}, "unknown endpoint fal-ai/nope"),
        (0, {"args": {"openai_models": {"x": {"edits": "fal-ai/nope"}}}}, "unknown endpoint fal-ai/nope"),
        (1, {"args": {"model": "zoo:flux", "endpoints": []}}, "application flux: endpoints"),
        (
            0,
            {"deployments": [{"name": "gateway", "user_config": {"models": {"x": {}}}}]},
            "user_config of gateway",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(
    tmp_path: Path, app: int, changes: dict[str, Any], named: str
) -> None:
    applications = [dict(each) for each in SHIPPED["applications"]]
    applications[app] |= changes
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(SHIPPED | {"applications": applications}))
    with pytest.raises(ValueError, match=named):
        server.load_config(path, None, None)
