"""The webhooks in this machine's queue."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.markup import escape
from rich.table import Column, Table

from deployments.cli.stores import front, in_queue
from deployments.cli.terminal import CONFIG, Config, console, errors, explained, shown_time
from deployments.queue import Outbox, open_audit, open_outbox
from deployments.webhooks.keyring import open_keyring
from schemas.access import Action, Actor
from schemas.deliveries import DeliveryState
from schemas.settings import FrontSettings

commands = typer.Typer(no_args_is_help=True, help="The webhooks in this machine's queue, for its operator.")

T = TypeVar("T")


@commands.command("list")
def list_webhooks(
    state: Annotated[DeliveryState | None, typer.Option(help="only those")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
    config: Config = CONFIG,
) -> None:
    """List the webhooks of the requests that ended last, the newest first."""
    found = _with_outbox(config, lambda outbox: outbox.newest(limit, state))
    whole = Column("request", no_wrap=True, min_width=36)  # to be copied
    table = Table(whole, "to", "state", "tries", "last answer", "ended", "next try")
    for each in found:
        last = each.last_error or each.last_status
        times = (each.ended_at, each.next_attempt_at)
        cells = (_without_query(each.url), each.state, each.attempts, last or "", *map(shown_time, times))
        table.add_row(each.request_id, *(escape(str(cell)) for cell in cells))
    console.print(table)


@commands.command("show")
def show_webhook(request_id: str, config: Config = CONFIG) -> None:
    """Show every try of a request's webhook."""
    found = _with_outbox(config, lambda outbox: outbox.find(request_id))
    if found is None:
        raise _no_webhook(request_id)
    record, log = found
    console.print(f"{escape(_without_query(record.url))}  {record.state}", highlight=False)
    table = Table("try", "began", "answer", "seconds")
    for each in log:
        went = each.outcome
        answer = "no outcome" if went is None else went.error or went.status
        took = "" if went is None else f"{went.duration_s:.3f}"
        table.add_row(str(each.attempt), shown_time(each.began_at), escape(str(answer)), took)
    console.print(table)


@commands.command()
def redeliver(request_id: str, config: Config = CONFIG) -> None:
    """Send a request's webhook again, whatever came of it: at once, and with all its retries."""
    before = _with_outbox(config, lambda outbox: outbox.redeliver(request_id))
    if before is None:
        raise _no_webhook(request_id)
    if before == DeliveryState.SENDING:
        errors.print("[red]it is being sent at this moment[/]; see `darkroom webhooks show`")
        raise typer.Exit(1)
    console.print(f"was {before}, is due now", highlight=False)


@commands.command()
def rotate(config: Config = CONFIG) -> None:
    """Draw a new key to sign with. It is published now and signs once every receiver can know it."""
    with explained():
        settings = front(config).webhooks
        signs_from = open_keyring(settings.keys, settings.key_overlap_s).rotate()
        in_queue(config, open_audit, lambda audit: audit.add(Action.ROTATE_KEY, Actor(""), str(signs_from)))
    console.print(f"the new key signs from {shown_time(signs_from)} on", highlight=False)


def _with_outbox(config: Path, work: Callable[[Outbox], Awaitable[T]]) -> T:
    """What `work` finds in the queue's own webhooks, whether the server runs or not."""

    async def opened(settings: FrontSettings) -> T:
        outbox = open_outbox(settings.queue_url, settings.webhooks.lease_s)
        try:
            return await work(outbox)
        finally:
            await outbox.close()

    with explained():
        return asyncio.run(opened(front(config)))


def _no_webhook(request_id: str) -> typer.Exit:
    errors.print(f"[red]no webhook[/] of {escape(request_id)}: unknown, unfinished, or none was asked for")
    return typer.Exit(1)


def _without_query(url: str) -> str:
    """Queries carry secrets."""
    return url.partition("?")[0]
