"""`darkroom keys` and `darkroom audit`, on the machine of the queue."""

import ast
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from deployments.cli import app, terminal

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(terminal.console, "width", 250)
    args = {
        "queue_url": f"sqlite:///{tmp_path}/queue.sqlite3",
        "webhooks": {"keys": f"file://{tmp_path}/webhook-keys"},
    }
    front = {"name": "darkroom", "import_path": "deployments.app:front", "args": args}
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump({"applications": [front]}))
    return path


def said(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--config", str(config)])


def created(config: Path, *arguments: str) -> tuple[str, str]:
    done = said(config, "keys", "create", *arguments)
    assert done.exit_code == 0, done.output
    key_id, _, secret = done.output.strip().partition(":")
    return key_id, secret


def test_t02_a_secret_is_shown_once(config: Path) -> None:
    key_id, secret = created(config, "--tenant", "alice", "--label", "the [web] shop")
    assert len(bytes.fromhex(secret)) == 32
    for command in (["keys", "list"], ["keys", "revoke", key_id], ["keys", "list"], ["audit"]):
        done = said(config, *command)
        assert done.exit_code == 0
        assert secret not in done.output and "digest" not in done.output


def test_keys_are_listed_with_what_they_may(config: Path) -> None:
    limits = ["--max-priority", "low", "--per-minute", "5", "--max-queued", "4", "--max-running", "3"]
    key_id, _ = created(config, "--tenant", "alice", "--label", "shop", *limits, "--daily-requests", "2")
    own, _ = created(config)
    assert said(config, "keys", "revoke", own).output.strip() == "revoked"
    assert said(config, "keys", "revoke", own).output.strip() == "was revoked before"
    [mine] = [line for line in said(config, "keys", "list").output.splitlines() if key_id in line]
    for word in ("alice", "shop", "max_priority low", "per_minute 5", "max_queued 4", "daily_requests 2"):
        assert word in mine
    [other] = [line for line in said(config, "keys", "list").output.splitlines() if own in line]
    assert other.count(own) == 2 and other.count("Z") == 2  # a tenant of its own; created and revoked


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "--tenant", "a b"],
        ["create", "--max-priority", "high"],
        ["create", "--per-minute", "0"],
        ["revoke", "nobody"],
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments: list[str], config: Path) -> None:
    done = said(config, "keys", *arguments)
    assert done.exit_code in (1, 2) and "Traceback" not in done.output
    assert said(config, "audit").output == ""


def test_t37_the_audit_is_printed_as_json_lines(config: Path) -> None:
    key_id, _ = created(config, "--tenant", "alice")
    other, _ = created(config, "--tenant", "bob")
    said(config, "keys", "revoke", key_id)
    rows = [json.loads(line) for line in said(config, "audit").output.splitlines()]
    assert [(row["action"], row["subject"]) for row in rows] == [
        ("key.revoke", key_id),
        ("key.create", other),
        ("key.create", key_id),
    ]
    assert set(rows[0]) == {"seq", "at", "action", "tenant", "key_id", "address", "subject"}
    assert rows[0]["at"].endswith("+00:00")
    [one] = said(config, "audit", "--tenant", "alice", "--limit", "1").output.splitlines()
    assert json.loads(one) == rows[0]


def test_t37_a_new_key_for_webhooks_is_written_down_once(config: Path) -> None:
    assert said(config, "webhooks", "rotate").exit_code == 0
    assert said(config, "webhooks", "rotate").exit_code == 1  # one waits already
    [row] = [json.loads(line) for line in said(config, "audit").output.splitlines()]
    assert (row["action"], row["tenant"], row["key_id"]) == ("webhook_key.rotate", "", None)


# Who may change or delete rows of the audit: the retention.
ALLOWED = {("statements.py", "delete")}


def test_t37_nothing_changes_or_deletes_what_was_written_down() -> None:
    found = set()
    for path in sorted((ROOT / "deployments").rglob("*.py")):
        text = path.read_text()
        assert "UPDATE audit" not in text and "DELETE FROM audit" not in text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                if called in ("update", "delete", "drop", "truncate") and "audit" in names:
                    found.add((path.name, called))
    assert found == ALLOWED
