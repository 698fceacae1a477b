"""Requests to a server, as any client makes them."""

import base64
import json
import re
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deployments.cli.terminal import LOCAL_URL, Key, console, errors, explained
from deployments.remote import Remote

commands = typer.Typer()

Url = Annotated[str, typer.Option(envvar="DARKROOM_URL", help="the server")]


@commands.command()
def run(
    endpoint: Annotated[str, typer.Argument(help="an endpoint id; see `darkroom models`")],
    input: Annotated[
        list[str], typer.Option("--input", "-i", help="a JSON file, - for standard input, or name=value")
    ],
    out: Annotated[Path, typer.Option(help="where pictures are put")] = Path("."),
    url: Url = LOCAL_URL,
    key: Key = None,
) -> None:
    """Make pictures: submit to the queue, watch, download."""
    with _connected(url, key) as remote:
        receipt = remote.submit(endpoint, _fields(input))
        _watch(remote, receipt)
        output = remote.result(receipt["response_url"])
        for number, image in enumerate(output.get("images", [])):
            path = _save(remote, image, out / f"{receipt['request_id']}-{number}")
            image["url"] = image["url"] if not image["url"].startswith("data:") else "data:…"
            console.print(f"{path}  {image['width']} × {image['height']}", highlight=False)
        console.print_json(json.dumps(output))


@commands.command()
def status(request_id: str, url: Url = LOCAL_URL, key: Key = None) -> None:
    """Show where a request is, with its log."""
    with _connected(url, key) as remote:
        console.print_json(json.dumps(remote.status(request_id)))


@commands.command()
def cancel(request_id: str, url: Url = LOCAL_URL, key: Key = None) -> None:
    """Give a request up."""
    with _connected(url, key) as remote:
        console.print(remote.cancel(request_id)["status"])


@commands.command()
def models(url: Url = LOCAL_URL, key: Key = None) -> None:
    """List the endpoints that a server serves."""
    with _connected(url, key) as remote:
        table = Table("endpoint")
        for endpoint in remote.endpoints():
            table.add_row(endpoint)
        console.print(table)


def _fields(inputs: list[str]) -> dict[str, Any]:
    """The request's fields from files, standard input and name=value pairs; later ones win."""
    fields: dict[str, Any] = {}
    for each in inputs:
        name, equals, value = each.partition("=")
        if equals and name.isidentifier():
            fields[name] = _value(value)
        else:
            text = sys.stdin.read() if each == "-" else Path(each).read_text()
            document = json.loads(text)
            if not isinstance(document, dict):
                raise ValueError(f"{each} must hold a JSON object")
            fields.update(document)
    return fields


def _value(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _watch(remote: Remote, receipt: dict[str, Any]) -> None:
    """Show the queue position and then step k of n."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task("in queue", total=None)
        for document in remote.follow(receipt["status_url"]):
            if "queue_position" in document:
                progress.update(bar, description=f"in queue, {document['queue_position']} ahead")
            for line in document["logs"] or []:
                if step := re.fullmatch(r"step (\d+)/(\d+)", line["message"]):
                    done, total = map(int, step.groups())
                    progress.update(bar, description=line["message"], completed=done, total=total)
                else:
                    style = "dim" if line["level"] in ("DEBUG", "INFO") else "yellow"
                    progress.console.print(f"{line['level'].lower()}: {line['message']}", style=style)


def _save(remote: Remote, image: dict[str, Any], stem: Path) -> Path:
    link = image["url"]
    data = base64.b64decode(link.partition(",")[2]) if link.startswith("data:") else remote.download(link)
    path = stem.with_name(f"{stem.name}.{image['content_type'].removeprefix('image/')}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@contextmanager
def _connected(url: str, key: str | None) -> Iterator[Remote]:
    with explained(), closing(Remote(url, key)) as remote:
        try:
            yield remote
        except httpx.ConnectError as error:
            hint = "start one with `darkroom serve`, or name another with --url"
            raise ConnectionError(f"no server answers at {url}; {hint}") from error
