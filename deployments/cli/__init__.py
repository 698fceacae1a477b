"""The command line: thin calls on a server, and the server itself."""

import typer

from deployments.cli import audit, configuration, connect, keys, requests, server, webhooks, zoo

app = typer.Typer(no_args_is_help=True, add_completion=True, help="Self-hosted fal.ai image endpoints.")
for part in (server, requests, connect, configuration, audit):
    app.add_typer(part.commands)
app.add_typer(webhooks.commands, name="webhooks")
app.add_typer(keys.commands, name="keys")
app.add_typer(zoo.commands, name="zoo")
