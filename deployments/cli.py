"""The command line: thin calls on a server, and the server itself."""

import asyncio
import base64
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from deployments import manifests, queue, server
from deployments.connect import child
from deployments.connect.authority import Authority, user_folder
from deployments.connect.environment import variables
from deployments.connect.hosts import Server, server_at
from deployments.connect.listener import Listener
from deployments.connect.tls import tls_in_front
from deployments.gateway import keys
from deployments.queue import Audit, KeyTable, Outbox, open_audit, open_keys, open_outbox
from deployments.remote import Refused, Remote
from deployments.webhooks.keyring import open_keyring
from pipelines import zoo
from schemas.access import Allowance
from schemas.deliveries import DeliveryState
from schemas.errors import Erased, NoRoom, StoreDown
from schemas.jobs import Priority
from schemas.settings import FrontSettings

app = typer.Typer(no_args_is_help=True, add_completion=True, help="Self-hosted fal.ai image endpoints.")
console = Console()
errors = Console(stderr=True)

webhooks = typer.Typer(no_args_is_help=True, help="The webhooks in this machine's queue, for its operator.")
app.add_typer(webhooks, name="webhooks")

key_table = typer.Typer(no_args_is_help=True, help="The keys in this machine's queue, for its operator.")
app.add_typer(key_table, name="keys")

embedded = typer.Typer(no_args_is_help=True, help="The embedded models.")
app.add_typer(embedded, name="zoo")

T = TypeVar("T")
OpenT = TypeVar("OpenT", KeyTable, Audit)

KEYS_ENV = FrontSettings.model_fields["keys_env"].default

Url = Annotated[str, typer.Option(envvar="DARKROOM_URL", help="the server")]
Key = Annotated[str | None, typer.Option(envvar="FAL_KEY", help="ID:SECRET, where the server wants one")]
CONFIG = Path("serve_config.yaml")
Config = Annotated[Path, typer.Option(exists=True, dir_okay=False, help="the server's configuration")]
LOCAL_URL = "http://127.0.0.1:8000"
CONNECT_PORT = 8768
ServerUrl = Annotated[str, typer.Option("--server", envvar="DARKROOM_URL", help="the server")]
PassThrough = Annotated[
    bool, typer.Option("--pass-through", help="tunnel to hosts that are not fal's, instead of refusing them")
]


@app.command()
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
    with _explained():
        is_closed = bool(keys.parse(os.environ[KEYS_ENV])) or bool(_in_queue(config, open_keys, KeyTable.all))
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
        with _explained(), front or nullcontext():
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


@app.command()
def plan(
    config: Config = CONFIG,
    gpu_gib: Annotated[
        float | None, typer.Option(help="memory of a GPU; without it no verdict is given", min=0)
    ] = None,
) -> None:
    """Tell what each model takes of a GPU, by its files and without loading them; needs no GPU itself."""
    with _explained():
        settings = server.model_settings(server.load_config(config, None, None))
    from pipelines.placement import GIB, placed  # imports torch, which the other commands do not need
    from pipelines.sources import locate

    card_bytes = None if gpu_gib is None else int(gpu_gib * GIB)
    found = [placed(each, locate, card_bytes) for each in settings]
    for placement in found:
        print("\n".join(placement.lines()))
    with _explained():
        for placement in found:
            placement.check()


@app.command()
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


@app.command()
def status(request_id: str, url: Url = LOCAL_URL, key: Key = None) -> None:
    """Show where a request is, with its log."""
    with _connected(url, key) as remote:
        console.print_json(json.dumps(remote.status(request_id)))


@app.command()
def cancel(request_id: str, url: Url = LOCAL_URL, key: Key = None) -> None:
    """Give a request up."""
    with _connected(url, key) as remote:
        console.print(remote.cancel(request_id)["status"])


@app.command()
def models(url: Url = LOCAL_URL, key: Key = None) -> None:
    """List the endpoints that a server serves."""
    with _connected(url, key) as remote:
        table = Table("endpoint")
        for endpoint in remote.endpoints():
            table.add_row(endpoint)
        console.print(table)


@app.command()
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

    with _explained():
        asyncio.run(listen(*_listener(server, pass_through)))


@app.command("exec", context_settings={"allow_interspersed_args": False})
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

    with _explained():
        code = asyncio.run(run_it(*_listener(server, pass_through)))
    raise typer.Exit(code)


def _listener(url: str, passes_through: bool) -> tuple[Server, Listener, Authority]:
    """What both need. Raises ValueError, OSError."""
    target, authority = server_at(url), Authority(user_folder())
    return target, Listener(target, authority, passes_through=passes_through), authority


@webhooks.command("list")
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
        cells = (_without_query(each.url), each.state, each.attempts, last or "", *map(_time, times))
        table.add_row(each.request_id, *(escape(str(cell)) for cell in cells))
    console.print(table)


@webhooks.command("show")
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
        table.add_row(str(each.attempt), _time(each.began_at), escape(str(answer)), took)
    console.print(table)


@webhooks.command()
def redeliver(request_id: str, config: Config = CONFIG) -> None:
    """Send a request's webhook again, whatever came of it: at once, and with all its retries."""
    before = _with_outbox(config, lambda outbox: outbox.redeliver(request_id))
    if before is None:
        raise _no_webhook(request_id)
    if before == DeliveryState.SENDING:
        errors.print("[red]it is being sent at this moment[/]; see `darkroom webhooks show`")
        raise typer.Exit(1)
    console.print(f"was {before}, is due now", highlight=False)


@webhooks.command()
def rotate(config: Config = CONFIG) -> None:
    """Draw a new key to sign with. It is published now and signs once every receiver can know it."""
    with _explained():
        settings = _front(config).webhooks
        signs_from = open_keyring(settings.keys, settings.key_overlap_s).rotate()
    console.print(f"the new key signs from {_time(signs_from)} on", highlight=False)


@key_table.command("create")
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
    with _explained():
        allowance = Allowance(_priority(max_priority), per_minute, max_queued, max_running, daily_requests)
    key, secret = _with_keys(config, lambda table: table.create(tenant, label, allowance))
    print(f"{key.key_id}:{secret}")


@key_table.command("list")
def list_keys(config: Config = CONFIG) -> None:
    """List every key, with what it may and never with what opens."""
    limits = Column("limits", overflow="fold")
    table = Table(Column("id", no_wrap=True, min_width=36), "tenant", "label", "created", "revoked", limits)
    for each in _with_keys(config, KeyTable.all):
        times = (_time(each.created_at), _time(each.revoked_at))
        cells = (each.key_id, each.tenant, each.label, *times, _limits(each.allowance))
        table.add_row(*map(escape, cells))
    console.print(table)


@key_table.command("revoke")
def revoke_key(key_id: str, config: Config = CONFIG) -> None:
    """Make a key worthless, for ever, within two seconds."""
    before = _with_keys(config, lambda table: table.revoke(key_id))
    if before is None:
        errors.print(f"[red]no key[/] {escape(key_id)}; those of {KEYS_ENV} are not in the table")
        raise typer.Exit(1)
    console.print("was revoked before" if before.revoked_at is not None else "revoked")


@app.command("manifests")
def write_manifests(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)] = Path("cluster"),
    config: Config = CONFIG,
) -> None:
    """Write what the manifests in cluster/ take from the configuration and from this version of darkroom."""
    with _explained():
        for path, content in manifests.written(folder, config).items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
            print(path)


@embedded.command("build")
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
    with _explained(), Progress(*columns, console=errors) as progress:
        bars: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done)

        made = zoo.train(only or (), show, checkpoints=checkpoints, into=into, device=device)
    for folder in made:
        print(folder)


@app.command("audit")
def show_audit(
    tenant: Annotated[str | None, typer.Option(help="only what it did, or was done to it")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 100,
    config: Config = CONFIG,
) -> None:
    """Print who did what as JSON lines, the newest first."""
    with _explained():
        found = _in_queue(config, open_audit, lambda audit: audit.newest(limit, tenant))
    for each in found:
        print(json.dumps({**asdict(each), "at": datetime.fromtimestamp(each.at, UTC).isoformat()}))


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
    with _explained():
        return _in_queue(config, open_keys, work)


def _in_queue(config: Path, opens: Callable[[str], OpenT], work: Callable[[OpenT], Awaitable[T]]) -> T:
    async def opened(url: str) -> T:
        place = opens(url)
        try:
            return await work(place)
        finally:
            await place.close()

    return asyncio.run(opened(_front(config).queue_url))


@app.command()
def migrate(
    to: Annotated[
        str, typer.Option(help="a revision; head is this version's own, base drops every table and row")
    ] = "head",
    queue_url: Annotated[str | None, typer.Option(help="instead of the configuration's")] = None,
    config: Config = CONFIG,
) -> None:
    """Bring the queue's tables to a revision, up or down. The server itself brings them up when it starts."""
    with _explained():
        before, now = queue.migrate(queue_url or _front(config).queue_url, to)
    console.print(f"from {before or 'no tables'} to {now or 'no tables'}", highlight=False)


def _with_outbox(config: Path, work: Callable[[Outbox], Awaitable[T]]) -> T:
    """What `work` finds in the queue's own webhooks, whether the server runs or not."""

    async def opened(settings: FrontSettings) -> T:
        outbox = open_outbox(settings.queue_url, settings.webhooks.lease_s)
        try:
            return await work(outbox)
        finally:
            await outbox.close()

    with _explained():
        return asyncio.run(opened(_front(config)))


def _front(config: Path) -> FrontSettings:
    return server.front_settings(server.load_config(config, None, None))


def _no_webhook(request_id: str) -> typer.Exit:
    errors.print(f"[red]no webhook[/] of {escape(request_id)}: unknown, unfinished, or none was asked for")
    return typer.Exit(1)


def _time(at: float | None) -> str:
    return "" if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}Z"


def _without_query(url: str) -> str:
    """Queries carry secrets."""
    return url.partition("?")[0]


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


def _stop_on_signal(stopped: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())


@contextmanager
def _connected(url: str, key: str | None) -> Iterator[Remote]:
    with _explained(), closing(Remote(url, key)) as remote:
        yield remote


@contextmanager
def _explained() -> Iterator[None]:
    """Say what is wrong in a line, without a traceback."""
    try:
        yield
    except (
        Refused,
        Erased,
        StoreDown,
        NoRoom,
        RuntimeError,
        ValueError,
        OSError,
        httpx.TransportError,
        httpx.InvalidURL,
    ) as error:
        errors.print(f"[red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
