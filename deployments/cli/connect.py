"""This machine's programs that were written for fal, with a server in fal's place."""

import asyncio
import os
import shlex
from typing import Annotated

import typer
from rich.markup import escape

from deployments.cli.terminal import LOCAL_URL, Key, errors, explained
from deployments.connect import child
from deployments.connect.authority import Authority, user_folder
from deployments.connect.environment import variables
from deployments.connect.hosts import Server, server_at
from deployments.connect.listener import Listener

commands = typer.Typer()

CONNECT_PORT = 8768
ServerUrl = Annotated[str, typer.Option("--server", envvar="DARKROOM_URL", help="the server")]
PassThrough = Annotated[
    bool, typer.Option("--pass-through", help="tunnel to hosts that are not fal's, instead of refusing them")
]


@commands.command()
def connect(
    server: ServerUrl = LOCAL_URL,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one")] = CONNECT_PORT,
    key: Key = None,
    pass_through: PassThrough = False,
) -> None:
    """Be fal to programs on this machine until Ctrl-C. Prints what to set in their environment."""

    async def listen(target: Server, listener: Listener, authority: Authority) -> None:
        async with listener.listening(port) as taken:
            for name, value in variables(taken, target, authority, os.environ, key).items():
                print(f"export {name}={shlex.quote(value)}", flush=True)
            errors.print(f"listening on 127.0.0.1:{taken} for {server}", highlight=False)
            await child.until_told()

    with explained():
        asyncio.run(listen(*_listener(server, pass_through)))


@commands.command("exec", context_settings={"allow_interspersed_args": False})
def execute(
    command: Annotated[list[str], typer.Argument(help="the command with its arguments, after --")],
    server: ServerUrl = LOCAL_URL,
    key: Key = None,
    pass_through: PassThrough = False,
) -> None:
    """Run a program that was written for fal, with this server in fal's place."""

    async def run_it(target: Server, listener: Listener, authority: Authority) -> int:
        async with listener.listening() as taken:
            ours = variables(taken, target, authority, os.environ, key)
            try:
                return await child.run(command, os.environ | ours)
            except (FileNotFoundError, PermissionError) as error:
                errors.print(f"[red]{escape(command[0])}[/]: {error.strerror}", highlight=False)
                return 127 if isinstance(error, FileNotFoundError) else 126

    with explained():
        code = asyncio.run(run_it(*_listener(server, pass_through)))
    raise typer.Exit(code)


def _listener(url: str, passes_through: bool) -> tuple[Server, Listener, Authority]:
    """What both need. Raises ValueError, OSError."""
    target, authority = server_at(url), Authority(user_folder())
    return target, Listener(target, authority, passes_through=passes_through), authority
