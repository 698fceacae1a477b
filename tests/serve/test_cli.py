"""The command line against a running server."""

import json
import socket
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner, Result

from deployments.cli import app
from tests.support.server import Server

ENDPOINT = "fal-ai/flux/dev"
SMALL = ["-i", 'image_size={"width":64,"height":64}', "-i", "num_inference_steps=2"]


def cli(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def test_run_makes_a_picture_from_pairs(server: Server, tmp_path: Path) -> None:
    done = cli("run", ENDPOINT, "-i", "prompt=a cat", *SMALL, "--out", str(tmp_path), "--url", server.url)
    assert done.exit_code == 0, done.output
    [picture] = tmp_path.glob("*.jpeg")
    with Image.open(picture) as image:
        assert image.size == (64, 64)


def test_run_reads_standard_input_and_later_pairs_win(server: Server, tmp_path: Path) -> None:
    fields = json.dumps({"prompt": "a cat", "seed": 1, "sync_mode": True})
    options = ["--out", str(tmp_path), "--url", server.url]
    done = cli("run", ENDPOINT, "-i", "-", *SMALL, "-i", "seed=5", *options, stdin=fields)
    assert done.exit_code == 0, done.output
    assert '"seed": 5' in done.output
    assert len(list(tmp_path.iterdir())) == 1


def test_status_and_cancel_find_a_request_by_its_id(server: Server, tmp_path: Path) -> None:
    cli("run", ENDPOINT, "-i", "prompt=x", *SMALL, "--out", str(tmp_path), "--url", server.url)
    [picture] = tmp_path.iterdir()
    request_id = picture.stem.removesuffix("-0")
    shown = cli("status", request_id, "--url", server.url)
    assert '"COMPLETED"' in shown.output
    assert "step 2/2" in shown.output
    refused = cli("cancel", request_id, "--url", server.url)
    assert refused.exit_code == 1
    assert "already completed" in refused.output


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    done = cli("models", "--url", url)
    assert done.exit_code == 1
    assert f"no server answers at {url}" in done.output.replace("\n", "")


def test_mistakes_are_told_in_a_line(server: Server) -> None:
    for arguments, said in (
        (["run", ENDPOINT, "-i", "promt=x"], "prompt: Field required"),
        (["run", "fal-ai/nope", "-i", "prompt=x"], "no endpoint fal-ai/nope"),
        (["status", "nonsense"], "no request nonsense"),
    ):
        done = cli(*arguments, "--url", server.url)
        assert done.exit_code == 1
        assert said in done.output
        assert "Traceback" not in done.output


def test_models_lists_the_endpoints(server: Server) -> None:
    assert ENDPOINT in cli("models", "--url", server.url).output
