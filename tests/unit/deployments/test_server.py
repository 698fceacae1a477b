"""Configuration files: what is wrong is said before anything starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import server
from pipelines.registry import ENDPOINTS
from schemas.settings import Catalogue
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


def test_one_option_puts_all_models_on_the_cpu(tmp_path: Path) -> None:
    """The file is that of a machine with GPUs."""
    config = json.loads(json.dumps(SHIPPED))  # a copy whose parts are not shared
    for application in config["applications"][1:]:
        application["args"] |= {"device": "cuda", "dtype": "bfloat16", "num_gpus": 0.5}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    models = server.model_settings(server.load_config(path, None, None, "cpu"))
    assert [(each.device, each.dtype, each.num_gpus) for each in models] == [("cpu", "float32", 0)] * 3
    models = server.model_settings(server.load_config(path, None, None, "cuda:1"))
    assert [(each.device, each.dtype, each.num_gpus) for each in models] == [("cuda:1", "bfloat16", 0.5)] * 3
    with pytest.raises(ValueError, match="application flux: device"):
        server.load_config(path, None, None, "tpu")


def split(config: dict[str, Any]) -> None:
    """Give the first endpoint of `flux` an application of its own: its line moves, the rest is copied."""
    front, flux, *_ = config["applications"]
    for deployment in front["deployments"]:
        models = deployment["user_config"]["models"]
        first, *rest = models["flux"]["endpoints"]
        models["flux"] = models["flux"] | {"endpoints": rest}
        models["dev"] = models["flux"] | {"endpoints": [first]}
    config["applications"].append(flux | {"name": "dev", "args": flux["args"] | {"endpoints": [first]}})
    flux["args"]["endpoints"] = rest


@pytest.mark.parametrize("change", [lambda config: None, split], ids=["by base model", "an endpoint apart"])
def test_both_layouts_load_and_every_endpoint_has_one_application(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    config = json.loads(json.dumps(SHIPPED))  # a copy whose parts are not shared
    change(config)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    loaded = server.load_config(path, None, None)
    served = [each for model in server.model_settings(loaded) for each in model.endpoints]
    assert sorted(served) == sorted(ENDPOINTS)
    catalogue = loaded["applications"][0]["deployments"][0]["user_config"]
    assert Catalogue.model_validate(catalogue).routes().keys() == ENDPOINTS.keys()


def test_an_endpoint_that_leads_to_a_model_that_does_not_serve_it_is_named(tmp_path: Path) -> None:
    config = json.loads(json.dumps(SHIPPED))  # a copy whose parts are not shared
    config["applications"][1]["args"]["endpoints"] = config["applications"][1]["args"]["endpoints"][1:]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="fal-ai/flux/dev leads to flux, which does not serve it"):
        server.load_config(path, None, None)
