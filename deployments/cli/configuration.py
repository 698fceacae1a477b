"""What a configuration comes to, before a server runs."""

from pathlib import Path
from typing import Annotated

import typer

from deployments import manifests, queue, server
from deployments.cli.stores import front
from deployments.cli.terminal import CONFIG, Config, console, explained

commands = typer.Typer()


@commands.command()
def plan(
    config: Config = CONFIG,
    gpu_gib: Annotated[
        float | None, typer.Option(help="memory of a GPU; without it no verdict is given", min=0)
    ] = None,
) -> None:
    """Tell what each model takes of a GPU, by its files and without loading them; needs no GPU itself."""
    with explained():
        settings = server.model_settings(server.load_config(config, None, None))
    from pipelines.placement import GIB, placed  # imports torch, which the other commands do not need
    from pipelines.sources import locate

    card_bytes = None if gpu_gib is None else int(gpu_gib * GIB)
    found = [placed(each, locate, card_bytes) for each in settings]
    for placement in found:
        print("\n".join(placement.lines()))
    with explained():
        for placement in found:
            placement.check()


@commands.command("manifests")
def write_manifests(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)] = Path("cluster"),
    config: Config = CONFIG,
) -> None:
    """Write what the manifests in cluster/ take from the configuration and from this version of darkroom."""
    with explained():
        for path, content in manifests.written(folder, config).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
            print(path)


@commands.command()
def migrate(
    to: Annotated[
        str, typer.Option(help="a revision; head is this version's own, base drops every table and row")
    ] = "head",
    queue_url: Annotated[str | None, typer.Option(help="instead of the configuration's")] = None,
    config: Config = CONFIG,
) -> None:
    """Bring the queue's tables to a revision, up or down. The server itself brings them up when it starts."""
    with explained():
        before, now = queue.migrate(queue_url or front(config).queue_url, to)
    console.print(f"from {before or 'no tables'} to {now or 'no tables'}", highlight=False)
