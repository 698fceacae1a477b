"""README, docs/ and examples/, typed and run against the server, as they stand there."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from deployments.cli import app
from tests.clients.inputs import ALICE, APP, SMALL, drawing, shapes
from tests.clients.test_python_uploads import lora
from tests.support.documents import ROOT, Command, blocks, commands
from tests.support.node import NODE
from tests.support.receivers import receiving
from tests.support.server import Server
from tests.support.sites import serving
from tests.support.watching import follow

SHOWN_SERVER, SHOWN_KEY, SHOWN_RECEIVER = "http://127.0.0.1:8000", "me:secret", "https://your.app/darkroom"
# What docs/how-to/clients.md tells a Python program; pages that build on it do not repeat it.
POINTED = """import fal_client.client as c
B = "{server}"
c.RUN_URL_FORMAT, c.QUEUE_URL_FORMAT = B + "/run/", B + "/queue/"
c.REST_URL, c.CDN_URL = B + "/rest", B + "/cdn"
c.REALTIME_URL_FORMAT = B.replace("http", "ws", 1) + "/run/"
"""


def unique() -> dict[str, Command]:
    """What is to be run, by where it stands first."""
    told = {each.text: each for each in reversed(list(commands())) if each.why_not is None}
    return {f"{each.place} {each.text[:40]}": each for each in reversed(told.values())}


COMMANDS = unique()
PROGRAMS: dict[str, str] = {}
for _block in blocks("python"):
    if not _block.title:
        PROGRAMS[_block.page] = PROGRAMS.get(_block.page, "") + _block.text
SCRIPTS = {each.place: each.text for each in blocks("js", "javascript")}
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


@dataclass(frozen=True)
class Desk:
    """A folder with the files that the pages name, and how it is there."""

    folder: Path
    server: Server
    receiver: str
    environment: dict[str, str]

    def put(self, text: str) -> str:
        """The text with this server in the place of the one that is shown."""
        shown = {SHOWN_SERVER: self.server.url, SHOWN_KEY: ALICE, SHOWN_RECEIVER: self.receiver}
        for old, new in {**shown, "127.0.0.1:8000": self.server.url.partition("//")[2]}.items():
            text = text.replace(old, new)
        return text

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def desk(
    server: Server, node_packages: Path, flux_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    (folder / "out").mkdir()
    drawing((64, 64)).save(folder / "start.png")
    drawing((64, 64)).save(folder / "out" / "blank.png")
    drawing((64, 64)).save(folder / "tiger.jpg")
    shapes((64, 64)).save(folder / "fortress.png")
    shutil.copy(lora(flux_folder, folder / "stripes.safetensors"), folder / "out")
    for block in blocks("python"):
        if block.title and "/" not in block.title:
            (folder / block.title).write_text(block.text)
    (folder / "node_modules").symlink_to(NODE / "node_modules")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "serve_config.yaml").write_text(configuration(server, folder))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FAL_")}
    environment |= {"FAL_KEY": ALICE, "DARKROOM_URL": server.url, "key": ALICE, "PYTHONPATH": str(ROOT)}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_DATA_HOME": str(folder),
        "HF_HUB_OFFLINE": "0",  # or Hugging Face's client asks nobody
    }
    with receiving() as receiver:
        yield Desk(folder, server, receiver.url, environment)


def configuration(server: Server, folder: Path) -> str:
    """The server's, with a queue and keys of its own: what an operator types here changes nothing there."""
    config = yaml.safe_load((server.log.parent / "serve_config.yaml").read_text())
    args = config["applications"][0]["args"]
    args["queue_url"] = f"sqlite:///{folder}/queue.sqlite3"
    args["webhooks"]["keys"] = f"file://{folder}/webhook-keys"
    return str(yaml.safe_dump(config))


# --- commands ---


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_does_what_it_says(name: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    text = desk.put(COMMANDS[name].text)
    if not text.startswith("darkroom "):
        answer = desk.run("bash", "-ec", f"set -o pipefail\n{text}")
        assert json.loads(answer), answer
        if "request_id" in answer:  # of the queue; nobody waits for it
            httpx.put(json.loads(answer)["cancel_url"], headers={"authorization": f"Key {ALICE}"})
        return
    for variable, value in desk.environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(desk.folder)
    words = shlex.split(text, comments=True)[1:]
    if words[0] == "webhooks" and words[1] != "rotate":  # those of the server
        monkeypatch.chdir(desk.server.log.parent)
    if "ID" in words:
        words[words.index("ID")] = named(words, desk)
    words = ["head" if each == "REVISION" else each for each in words]
    done = CliRunner().invoke(app, words)
    # by when it is run: the request may have ended, its webhook may be on its way
    is_late = any(each in done.output for each in ("already completed", "being sent at this moment"))
    assert done.exit_code == 0 or is_late, done.output


def named(words: list[str], desk: Desk) -> str:
    """What ID stands for."""
    if words[0] == "keys":
        config = ["--config", str(desk.folder / "serve_config.yaml")]
        return CliRunner().invoke(app, ["keys", "create", *config]).output.strip().partition(":")[0]
    with httpx.Client(
        base_url=desk.server.url, headers={"authorization": f"Key {ALICE}"}, timeout=60
    ) as http:
        hook = {"fal_webhook": desk.receiver} if words[0] == "webhooks" else {}
        sent = http.post(f"/queue/{APP}/dev", params=hook, json=SMALL).json()
        assert [*follow(http, sent)][-1]["status"] == "COMPLETED"
    return str(sent["request_id"])


# --- programs ---


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_program_of_a_page_runs(page: str, desk: Desk) -> None:
    """The blocks of a page are one program, which prints what it got."""
    program = POINTED.format(server=desk.server.url) + desk.put(PROGRAMS[page])
    assert desk.run("python", "-W", "ignore", "-c", program).strip()


@pytest.mark.parametrize("place", SCRIPTS)
def test_a_script_of_a_page_runs(place: str, desk: Desk) -> None:
    file = desk.folder / "script.mjs"
    file.write_text(desk.put(SCRIPTS[place]))
    assert desk.run("node", "--experimental-websocket", file.name).strip()


# --- examples ---


@pytest.mark.parametrize(
    ("command", "pictures"),
    [
        (["python", "examples/client.py"], ["drawn.jpg", "remade.jpg"]),
        (["node", "examples/client.mjs"], ["node.jpg"]),
        (["sh", "examples/request.sh"], ["curl.jpg"]),
    ],
    ids=["python", "node", "curl"],
)
def test_an_example_leaves_its_pictures(command: list[str], pictures: list[str], desk: Desk) -> None:
    last = desk.run(*command, desk.server.url).splitlines()[-1]
    assert last == f"out/{pictures[-1]}"
    for name in pictures:
        with Image.open(desk.folder / "out" / name) as picture:
            assert picture.size == (128, 128)


def test_the_notebook_runs_from_its_first_cell_to_its_last(desk: Desk) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not each.get("outputs") for each in cells)
    program = "\n".join("".join(each["source"]) for each in cells if each["cell_type"] == "code")
    told = desk.run("python", "-W", "ignore", "-c", program)
    assert "less than or equal to 50" in told.splitlines()[-1]


def test_the_page_draws_in_a_browser(desk: Desk) -> None:
    with serving(ROOT / "examples") as site:
        url = f"{site}/page.html?server={desk.server.url}"
        done = subprocess.run(
            ["node", "example.mjs", url, ALICE], cwd=NODE, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["width"] == 128 and told["alt"] == "a green circle on the left"
    assert told["complaints"] == []
