"""The server itself."""

import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from deployments import server
from deployments.cli.stores import KEYS_ENV, in_queue
from deployments.cli.terminal import CONFIG, console, errors, explained
from deployments.connect.hosts import server_at
from deployments.connect.tls import tls_in_front
from deployments.gateway import keys
from deployments.queue import KeyTable, open_keys

commands = typer.Typer()


@commands.command()
def serve(
    config: Annotated[Path, typer.Option(exists=True, dir_okay=False)] = CONFIG,
    host: Annotated[str | None, typer.Option(help="instead of the file's")] = None,
    port: Annotated[int | None, typer.Option(help="instead of the file's", min=1, max=65535)] = None,
    device: Annotated[
        str | None, typer.Option(help="of all models, instead of the file's; cpu: in float32 and on no GPU")
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help=f"ID:SECRET; turns authentication on, as does {KEYS_ENV}"),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(exists=True, help="a certificate chain in PEM; listens for TLS as well")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(exists=True, help="its key in PEM")] = None,
    tls_port: Annotated[int, typer.Option(min=1, max=65535)] = 8443,
    verbose: Annotated[bool, typer.Option(help="show the logs of all processes")] = False,
    json_logs: Annotated[bool, typer.Option(help="log files of one JSON object a line")] = False,
) -> None:
    """Run the server in the foreground until Ctrl-C."""
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together")
    server.prepare_environment()
    os.environ[KEYS_ENV] = " ".join([*os.environ.get(KEYS_ENV, "").split(), *(key or [])])
    with explained():
        is_closed = bool(keys.parse(os.environ[KEYS_ENV])) or bool(in_queue(config, open_keys, KeyTable.all))
        settings = server.load_config(config, host, port, device)
        url = server.address(settings)
    if json_logs:
        settings["logging_config"] = {**(settings.get("logging_config") or {}), "encoding": "JSON"}
    if not is_closed:
        errors.print(
            f"[bold red]AUTHENTICATION IS OFF[/]: `darkroom keys create`, {KEYS_ENV} or --key turns it on."
        )
    host = settings["http_options"].get("host", "0.0.0.0")
    front = tls_in_front(server_at(url), host, tls_port, tls_cert, tls_key) if tls_cert and tls_key else None
    stopped = threading.Event()
    _stop_on_signal(stopped)
    try:
        with explained(), front or nullcontext():
            started = server.start(settings, verbose=verbose)
            _stop_on_signal(stopped)  # Ray has put its own handlers in place
            print(f"logs in {started.logs}\nray at {started.ray_address}", flush=True)
            print(f"metrics at {started.metrics_url}", flush=True)
            server.wait_until_ready(url, stopped, lambda line: console.print(line, highlight=False))
            if front and not stopped.is_set():
                print(f"TLS on port {tls_port}", flush=True)
            if not stopped.is_set():
                print(f"ready on {url}", flush=True)
            stopped.wait()
    finally:
        console.print("stopping")
        server.stop()


def _stop_on_signal(stopped: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
