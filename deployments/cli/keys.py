"""The keys in this machine's queue."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.markup import escape
from rich.table import Column, Table

from deployments.cli.stores import KEYS_ENV, in_queue
from deployments.cli.terminal import CONFIG, Config, console, errors, explained, shown_time
from deployments.queue import KeyTable, open_keys
from schemas.access import Allowance
from schemas.jobs import Priority

commands = typer.Typer(no_args_is_help=True, help="The keys in this machine's queue, for its operator.")

T = TypeVar("T")


@commands.command("create")
def create_key(
    tenant: Annotated[str | None, typer.Option(help="whose requests it sees; a new one if not given")] = None,
    label: Annotated[str, typer.Option(help="what it is for, in your words")] = "",
    max_priority: Annotated[str, typer.Option(help="normal or low; what asks for more gets this")] = "normal",
    per_minute: Annotated[int | None, typer.Option(min=1, help="requests accepted")] = None,
    max_queued: Annotated[int | None, typer.Option(min=1, help="of its tenant's requests that wait")] = None,
    max_running: Annotated[
        int | None,
        typer.Option(min=1, help="of its tenant's requests at once; queued ones wait, runs are refused"),
    ] = None,
    daily_requests: Annotated[int | None, typer.Option(min=1, help="requests accepted in a day, UTC")] = None,
    config: Config = CONFIG,
) -> None:
    """Draw a key and print it, ID:SECRET. It is shown this once; the server knows only its hash."""
    with explained():
        allowance = Allowance(_priority(max_priority), per_minute, max_queued, max_running, daily_requests)
    key, secret = _with_keys(config, lambda table: table.create(tenant, label, allowance))
    print(f"{key.key_id}:{secret}")


@commands.command("list")
def list_keys(config: Config = CONFIG) -> None:
    """List every key, with what it may and never with what opens."""
    limits = Column("limits", overflow="fold")
    table = Table(Column("id", no_wrap=True, min_width=36), "tenant", "label", "created", "revoked", limits)
    for each in _with_keys(config, KeyTable.all):
        times = (shown_time(each.created_at), shown_time(each.revoked_at))
        cells = (each.key_id, each.tenant, each.label, *times, _limits(each.allowance))
        table.add_row(*map(escape, cells))
    console.print(table)


@commands.command("revoke")
def revoke_key(key_id: str, config: Config = CONFIG) -> None:
    """Make a key worthless, for ever, within two seconds."""
    before = _with_keys(config, lambda table: table.revoke(key_id))
    if before is None:
        errors.print(f"[red]no key[/] {escape(key_id)}; those of {KEYS_ENV} are not in the table")
        raise typer.Exit(1)
    console.print("was revoked before" if before.revoked_at is not None else "revoked")


def _priority(name: str) -> Priority:
    known = {each.name.lower(): each for each in Priority}
    if name not in known:
        raise ValueError(f"--max-priority is {' or '.join(known)}, not {name!r}")
    return known[name]


def _limits(may: Allowance) -> str:
    given = {**asdict(may), "max_priority": may.max_priority.name.lower() if may.max_priority else None}
    return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)


def _with_keys(config: Path, work: Callable[[KeyTable], Awaitable[T]]) -> T:
    """What `work` finds in the queue's keys, whether the server runs or not."""
    with explained():
        return in_queue(config, open_keys, work)
