"""Settings: a wrong key or value stops the start and is named."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipelines.registry import ENDPOINTS
from schemas.settings import Catalogue, FrontSettings, LeaseSettings, ModelSettings, local_path

CONFIG: dict[str, Any] = yaml.safe_load((Path(__file__).parents[3] / "serve_config.yaml").read_text())
FRONT, *MODELS = CONFIG["applications"]


def test_the_shipped_file_is_valid_and_serves_known_endpoints() -> None:
    FrontSettings.model_validate(FRONT["args"])
    for app in MODELS:
        assert set(ModelSettings.model_validate(app["args"]).endpoints) <= set(ENDPOINTS)


def test_the_shipped_catalogue_agrees_with_the_models() -> None:
    [gateway, dispatcher] = [deployment["user_config"] for deployment in FRONT["deployments"]]
    assert gateway == dispatcher
    served = {app["name"]: tuple(app["args"]["endpoints"]) for app in MODELS}
    catalogue = Catalogue.model_validate(gateway)
    assert {name: entry.endpoints for name, entry in catalogue.models.items()} == served


def test_front_and_models_keep_their_files_in_one_place() -> None:
    assert {app["args"]["files_url"] for app in CONFIG["applications"]} == {FRONT["args"]["files_url"]}


@pytest.mark.parametrize(
    ("kind", "data", "named"),
    [
        (FrontSettings, {"que_url": "x"}, "que_url"),
        (FrontSettings, {"lease": {"lease_s": 5, "heartbeat_s": 4}}, "heartbeat_s"),
        (FrontSettings, {"webhooks": {"retries_s": [0]}}, "retries_s"),
        (FrontSettings, {"webhooks": {"timeout_s": 31}}, "lease_s"),
        (LeaseSettings, {"lease_s": 0}, "lease_s"),
        (ModelSettings, {"model": "x", "endpoints": []}, "endpoints"),
        (ModelSettings, {"model": "x", "endpoints": ["a"], "dtype": "int8"}, "dtype"),
        (ModelSettings, {"model": "x", "endpoints": ["a"], "device": "tpu"}, "device"),
        (ModelSettings, {"model": "x", "endpoints": ["a"], "min_replicas": 2}, "min_replicas"),
        (Catalogue, {"models": {"a": {"endpoints": ["e"]}, "b": {"endpoints": ["e"]}}}, "both a and b"),
    ],
)
def test_a_mistake_is_named(kind: type[Any], data: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        kind.model_validate(data)


def test_webhooks_are_tried_ten_times_again_within_two_hours() -> None:
    retries = FrontSettings().webhooks.retries_s
    assert (len(retries), sum(retries)) == (10, 7200)
    assert list(retries) == sorted(retries)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        setattr(FrontSettings(), "queue_url", "sqlite:///elsewhere")  # noqa: B010


def test_paths_in_urls_expand_the_home() -> None:
    assert local_path("file://~/x", "file") == Path.home() / "x"
    assert local_path("s3://bucket", "file") is None


@pytest.mark.parametrize("given", ["https://your.app/darkroom", "https://your.app/darkroom/"])
def test_a_public_url_may_lie_below_a_prefix_with_or_without_a_slash_at_its_end(given: str) -> None:
    assert FrontSettings(public_url=given).public_url == "https://your.app/darkroom"


@pytest.mark.parametrize("given", ["your.app", "//your.app", "ftp://your.app", "https://", "http://x/?a=b"])
def test_a_public_url_that_nothing_can_be_added_to_is_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="public_url"):
        FrontSettings(public_url=given)
