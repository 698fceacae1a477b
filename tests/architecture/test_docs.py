"""What the documentation says is so: commands, settings, inputs, paths. mkdocs checks the links in docs/."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from pydantic import TypeAdapter

from deployments.cli import app
from deployments.gateway.validation import ignored, validate
from docs import reference
from pipelines.registry import ENDPOINTS
from schemas.settings import FrontSettings, Limits, ModelEntry, ModelSettings, Settings
from tests.architecture.test_imports import ROOT
from tests.support.documents import HARMLESS, NOT_RUN, Command, blocks, commands

LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = reference.pages()


# --- commands ---


def test_every_command_is_run_or_said_why_not() -> None:
    """tests/clients/test_docs.py runs what is harmless; for the rest NOT_RUN has a reason."""
    unknown = [each for each in commands() if each.why_not is None and not each.text.startswith(HARMLESS)]
    assert [f"{each.place} {each.text}" for each in unknown] == []


@pytest.mark.parametrize("what", [what for what, _ in NOT_RUN])
def test_what_is_not_run_is_still_there(what: str) -> None:
    assert any(re.match(what, each.text) for each in commands())


OURS = [each for each in commands() if each.text.startswith("darkroom ")]


@pytest.mark.parametrize("command", OURS, ids=[each.place for each in OURS])
def test_a_command_of_ours_has_these_options(command: Command) -> None:
    known: Any = typer.main.get_command(app)
    words = command.text.partition(" -- ")[0].split()[1:]
    while getattr(known, "commands", None):
        known = known.commands[words.pop(0)]
    options = {option for each in known.params for option in each.opts} | {"--help"}
    used = {word for word in words[: words.index("#") if "#" in words else None] if word.startswith("-")}
    assert used <= options


# --- settings and inputs ---


FRAGMENTS = list(blocks("yaml"))


@pytest.mark.parametrize("block", FRAGMENTS, ids=[each.place for each in FRAGMENTS])
def test_a_fragment_of_configuration_is_one(block: Any) -> None:
    kinds: tuple[type[Settings], ...] = (FrontSettings, ModelSettings, ModelEntry)
    for name, value in yaml.safe_load(block.text).items():
        fields = [kind.model_fields[name] for kind in kinds if name in kind.model_fields]
        assert fields, f"there is no setting {name}"
        kind: Any = fields[0].annotation
        TypeAdapter(kind).validate_python(value)


INPUTS = [each for each in blocks("json") if each.title]


@pytest.mark.parametrize("block", INPUTS, ids=[each.place for each in INPUTS])
def test_a_request_that_is_shown_is_taken(block: Any) -> None:
    kind, fields = ENDPOINTS[block.title].input_type(), json.loads(block.text)
    validate(kind, fields, Limits())
    assert ignored(kind, fields) == []


# --- the reference ---


def test_the_reference_has_every_field_setting_and_command() -> None:
    for endpoint in ENDPOINTS.values():
        page = PAGES[f"reference/endpoints/{endpoint.stem}.md"]
        for field in endpoint.input_type().model_fields:
            assert f"| `{field}` |" in page
    for kind in (FrontSettings, ModelSettings, ModelEntry):
        for name, setting in kind.model_fields.items():
            assert f"| `{name}` |" in PAGES["reference/settings.md"]
            if isinstance(setting.default, int | float):
                assert f"`{json.dumps(setting.default)}`" in PAGES["reference/settings.md"]
    for command in ("serve", "exec", "webhooks redeliver", "keys create", "zoo build"):
        assert f"## `darkroom {command}`" in PAGES["reference/cli.md"]


def test_the_page_of_paths_has_every_route() -> None:
    page = (ROOT / "docs/reference/http.md").read_text()
    told = {re.sub(r"\{[^}]*\}", "{}", path) for path in re.findall(r"`(/[^`\s]*)`", page)}
    sources = "\n".join(path.read_text() for path in (ROOT / "deployments/gateway").glob("*.py"))
    routes = set(re.findall(r'Route\("(/[^"]+)"', sources))
    assert len(routes) > 20
    for route in routes - {"/rest/{path:path}", "/cdn/{path:path}"}:  # a 404 each
        path = re.sub(r"\{[^}]*\}", "{}", route).rstrip("/") or "/"
        assert any(each == path or each.startswith(f"{path}/") for each in told), route


# --- links out of what mkdocs sees ---


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text()):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each).strip().lower().replace(" ", "-") for each in headings}


def test_the_site_asks_nobody_else() -> None:
    """No fonts, no scripts, no pictures of other hosts: in the theme's settings, and in the pages."""
    text = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in text and "plugins: [search] " in text
    assert "mermaid" not in text and "extra_javascript" not in text
    for page in (ROOT / "docs").rglob("*.md"):
        assert not re.search(r"!\[[^\]]*\]\(http|<(script|img|link)\b", page.read_text()), page
