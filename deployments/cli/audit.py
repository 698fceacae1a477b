"""Who did what."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from deployments.cli.stores import in_queue
from deployments.cli.terminal import CONFIG, Config, explained
from deployments.queue import open_audit

commands = typer.Typer()


@commands.command("audit")
def show_audit(
    tenant: Annotated[str | None, typer.Option(help="only what it did, or was done to it")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 100,
    config: Config = CONFIG,
) -> None:
    """Print who did what as JSON lines, the newest first."""
    with explained():
        found = in_queue(config, open_audit, lambda audit: audit.newest(limit, tenant))
    for each in found:
        print(json.dumps({**asdict(each), "at": datetime.fromtimestamp(each.at, UTC).isoformat()}))
