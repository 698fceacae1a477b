"""What `darkroom serve` sets for Ray before it is imported."""

import ast
import os
from pathlib import Path

import pytest

from deployments import server


def test_t36_ray_is_started_with_a_token_and_without_a_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in server.DEFAULT_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(server, "free_ports", lambda count: 20_000)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    server.prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    [started] = [
        call
        for call in ast.walk(ast.parse(Path(server.__file__).read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "ray.init"
    ]
    told = {each.arg: ast.unparse(each.value) for each in started.keywords}
    assert (told["address"], told["include_dashboard"]) == ("'local'", "False")


def test_t36_the_operators_own_word_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "free_ports", lambda count: 20_000)
    monkeypatch.setattr(os, "environ", {**os.environ, "RAY_AUTH_MODE": "k8s"})
    server.prepare_environment()
    assert os.environ["RAY_AUTH_MODE"] == "k8s"


def test_t36_the_shipped_server_listens_on_this_machine_only() -> None:
    config = server.load_config(Path(server.__file__).parents[1] / "serve_config.yaml", None, None)
    assert config["http_options"]["host"] == "127.0.0.1"
