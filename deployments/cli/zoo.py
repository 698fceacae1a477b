"""The embedded models."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from deployments.cli.terminal import errors, explained
from pipelines import zoo

commands = typer.Typer(no_args_is_help=True, help="The embedded models.")


@commands.command("build")
def build_models(
    only: Annotated[
        list[str] | None, typer.Option(help="this model, and what it needs; all if not given")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    checkpoints: Annotated[Path | None, typer.Option(help="where a training goes on from")] = None,
    into: Annotated[Path, typer.Option(help="where the models are put")] = zoo.WEIGHTS,
) -> None:
    """Train the embedded models anew: an hour or two on a CPU. What was interrupted goes on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with explained(), Progress(*columns, console=errors) as progress:
        bars: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done)

        made = zoo.train(only or (), show, checkpoints=checkpoints, into=into, device=device)
    for folder in made:
        print(folder)
