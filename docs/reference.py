"""A hook of mkdocs: the pages of the reference, written from the schemas, the settings and the command line.

They are made while the site is built and lie in no folder, so they cannot fall behind the code.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

from deployments import metrics
from deployments.cli import app
from pipelines.registry import ENDPOINTS, Endpoint
from schemas.settings import FrontSettings, ModelEntry, ModelSettings

ROOT = Path(__file__).parents[1]
ENDPOINT_PAGES = "reference/endpoints"

_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "pattern": "matches `{}`",
}
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


# --- what mkdocs calls ---


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A line in the navigation for each endpoint."""
    for section in config.nav or []:
        for index, entry in enumerate(section.get("Reference", []) if isinstance(section, dict) else []):
            if entry == {"Endpoints": ENDPOINT_PAGES}:
                section["Reference"][index] = {"Endpoints": [f"{ENDPOINT_PAGES}/{name}" for name in _names()]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a file of the repository, which the site has not, becomes the file's path.

    One that leads nowhere stays a link, and mkdocs complains of it.
    """
    folder = (Path(config.docs_dir) / page.file.src_uri).parent

    def plain(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        is_outside = target.exists() and not target.is_relative_to(config.docs_dir)
        return f"{link[1]} (`{target.relative_to(ROOT)}`)" if is_outside else link[0]

    return _LINK.sub(plain, markdown)


# --- the pages ---


def pages() -> dict[str, str]:
    """Path below docs/ → Markdown."""
    return {
        "reference/settings.md": settings_page(),
        "reference/cli.md": cli_page(),
        "reference/metrics.md": metrics_page(),
        **{f"{ENDPOINT_PAGES}/{each.stem}.md": endpoint_page(each) for each in ENDPOINTS.values()},
    }


def endpoint_page(endpoint: Endpoint) -> str:
    module = endpoint.schema()
    _, _, what = (module.__doc__ or "").partition(": ")
    example = json.dumps(module.EXAMPLE, indent=2, ensure_ascii=False)
    return "\n".join(
        [
            f"# `{endpoint.id}`\n",
            f"{what[:1].upper()}{what[1:].strip()}\n",
            f"`POST /run/{endpoint.id}` answers with the output,",
            f"`POST /queue/{endpoint.id}` with URLs to follow,",
            f"`/openapi/{endpoint.id}` has the same in OpenAPI's form,",
            f"`/playground/{endpoint.id}` is a page to try it.\n",
            "## Input\n",
            *_tables(module.Input, "validation"),
            "## Output\n",
            *_tables(module.Output, "serialization"),
            "## Example\n",
            f"```json\n{example}\n```\n",
        ]
    )


def settings_page() -> str:
    parts: dict[str, tuple[type[BaseModel], str]] = {
        "The front": (
            FrontSettings,
            "`args` of the application `darkroom`: gateway, dispatcher, webhooks.",
        ),
        "The catalogue": (
            ModelEntry,
            "Each entry below `models:` in the `user_config` of gateway and dispatcher.",
        ),
        "A model": (ModelSettings, "`args` of every other application: one resident model."),
    }
    lines = [
        "# Settings\n",
        "What `serve_config.yaml` may say. An unknown key or a bad value stops the start and is named. "
        "Units are in the names.\n",
    ]
    for title, (kind, where) in parts.items():
        lines += [f"## {title}\n", f"{where}\n", *_tables(kind, "validation", prefix=f"{title}: ")]
    return "\n".join(lines)


def cli_page() -> str:
    root = typer.main.get_command(app)
    lines = ["# The command line\n", f"{root.help}\n"]
    for name, command in _commands(root, "darkroom"):
        lines += [f"## `{name}`\n", f"{command.help}\n", *_parameters(command)]
    return "\n".join(lines)


def metrics_page() -> str:
    known = [each for each in vars(metrics).values() if isinstance(each, metrics.Metric)]
    rows = [(f"`ray_{each.name}`", each.kind, _code(each.labels), each.description) for each in known]
    return "\n".join(
        [
            "# Metrics\n",
            "What Prometheus reads where `darkroom serve` says `metrics at …`, beside Ray's and Serve's own. "
            "Each has the labels `application`, `deployment` and `replica` too.\n",
            *_table(("metric", "kind", "labels", "what"), rows),
        ]
    )


def _names() -> list[str]:
    return [f"{endpoint.stem}.md" for endpoint in ENDPOINTS.values()]


# --- schemas as tables ---


def _tables(kind: type[BaseModel], mode: Any, prefix: str = "") -> Iterator[str]:
    """The fields of a model, and then those of every model that they lead to."""
    schema = kind.model_json_schema(mode=mode)
    yield from _fields(schema, prefix)
    for name, part in schema.get("$defs", {}).items():
        yield f"### {prefix}{name}\n"
        yield f"{part.get('description', '')}\n"
        if "enum" in part:
            yield f"{_code(part['enum'])}\n"
        yield from _fields(part, prefix)


def _fields(schema: Mapping[str, Any], prefix: str) -> list[str]:
    required = schema.get("required", ())
    rows = [
        (f"`{name}`", _type(field, prefix), _default(name, field, required), field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    ]
    return _table(("field", "type", "default", "what"), rows) if rows else []


def _type(field: Mapping[str, Any], prefix: str) -> str:
    """What a value may be, with its bounds; what stands elsewhere on the page as a link."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{_slug(prefix + name)})"
    if "enum" in field:
        return _code(field["enum"])
    if "const" in field:
        return _code([field["const"]])
    choices = field.get("anyOf") or field.get("oneOf") or field.get("allOf")
    if choices:
        return " or ".join(_type(each, prefix) for each in choices)
    told = str(field.get("type", "anything"))
    if told == "array":
        items = field.get("items") or {}
        told = f"list of {_type(items, prefix)}" if items else "list"
    elif told == "object" and isinstance(field.get("additionalProperties"), Mapping):
        told = f"map of names to {_type(field['additionalProperties'], prefix)}"
    bounds = [text.format(field[key]) for key, text in _BOUNDS.items() if key in field]
    return ", ".join([told, *bounds])


def _default(name: str, field: Mapping[str, Any], required: Sequence[str]) -> str:
    if name in required and "default" not in field:
        return "required"
    return f"`{json.dumps(field['default'], ensure_ascii=False)}`" if "default" in field else ""


# --- the command line as tables ---


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, groups opened, with its whole name."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
    for child, each in (children or {}).items():
        yield from _commands(each, f"{name} {child}")


def _parameters(command: Any) -> list[str]:
    rows = []
    for each in command.params:
        is_option = each.param_type_name == "option"
        spelled = ", ".join(f"`{name}`" for name in each.opts) if is_option else f"`{each.name.upper()}`"
        default = "" if each.default is None or callable(each.default) else f"`{each.default}`"
        variable = f" (or the variable `{each.envvar}`)" if getattr(each, "envvar", None) else ""
        shown = "required" if each.required else default
        rows.append((spelled, _taken(each), shown, f"{each.help or ''}{variable}"))
    return _table(("option", "takes", "default", "what"), rows) if rows else []


def _taken(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return "nothing"
    kind: Any = parameter.type_descriptor.annotation
    named = {str: "text", int: "a whole number", float: "a number", Path: "a path"}.get(kind)
    values = [each.value for each in getattr(kind, "__members__", {}).values()]
    return f"{named or _code(values) or 'text'}{', several times' if parameter.multiple else ''}"


# --- Markdown ---


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows), ""]


def _code(values: Sequence[Any]) -> str:
    return ", ".join(f"`{each}`" for each in values)


def _slug(title: str) -> str:
    """As the headings' anchors are made."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
