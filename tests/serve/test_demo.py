"""`make demo`, and beside it the tutorial of a LoRA: what a newcomer runs, on the models that are shipped."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

import httpx
import numpy as np
import pytest
from PIL import Image

from pipelines import zoo
from pipelines.zoo import judges
from tests.support.processes import descendants, kill
from tests.support.programs import ROOT, done, environment, under_exec
from tests.support.server import free_port

TIMEOUT_S = 580  # of what takes one or two minutes
TRAINED_STEPS = "40"  # of 200: the style is seen from about 30 on
LAST = "Ctrl-C stops the server."

# file of the demo → what its prompt asks for, and what style its LoRA has
DRAWN = {
    "fal-ai-flux-dev.jpg": ("white", "red", "plain"),
    "fal-ai-flux-lora-image-to-image.jpg": ("white", "blue", "outline"),
    "fal-ai-flux-general-rf-inversion.png": ("white", "green", "plain"),
    "fal-ai-fast-sdxl-controlnet-canny-image-to-image.jpg": ("black", "yellow", "plain"),
    "fal-ai-lora-image-to-image.png": ("pink", "purple", "plain"),
}


@dataclass(frozen=True)
class Demo:
    """A demo that has drawn, and keeps its server."""

    folder: Path
    url: str
    said: str

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.folder, FAL_KEY="demo:demo", PATH=os.environ["PATH"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The example as it stands, in a home of its own, until Ctrl-C."""
    folder, url = tmp_path_factory.mktemp("demo"), f"http://127.0.0.1:{free_port()}"
    (folder / "serve_config.yaml").write_text((ROOT / "serve_config.yaml").read_text())
    cache = zoo.locate("flux").parents[2]  # what is built already is not built again
    variables = {"HOME": str(folder), "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples/demo.py"), "--port", url.rpartition(":")[2]],
        cwd=folder,
        env=environment(folder, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    limit = Timer(TIMEOUT_S, lambda: kill(descendants([process.pid])))
    limit.start()
    try:
        yield Demo(folder, url, "".join(until(LAST, process)))
        process.send_signal(signal.SIGINT)
        said = process.communicate()[0]
        assert process.returncode == 0, said
    finally:
        limit.cancel()
        kill(descendants([process.pid]))
        process.wait()


def until(last: str, process: "subprocess.Popen[str]") -> Iterator[str]:
    """The lines up to this one."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if line.strip() == last:
            return


def seen(picture: Path) -> judges.Seen:
    with Image.open(picture) as image:
        return judges.look(np.asarray(image.convert("RGB")))


def test_the_demo_draws_what_it_asks_for(demo: Demo) -> None:
    assert demo.said.strip().endswith(LAST), demo.said
    for name, wanted in DRAWN.items():
        found = seen(demo.folder / "out" / name)
        assert (found.background, found.colour, found.style) == wanted, name


def test_the_demo_ends_with_a_contact_sheet_and_addresses_that_answer(demo: Demo) -> None:
    [sheet] = re.findall(r"^contact sheet file://(\S+)$", demo.said, re.MULTILINE)
    with Image.open(sheet) as image:
        assert Path(sheet) == demo.folder / "out" / "demo.png"
        assert image.height > len(DRAWN) * 192
    addresses = dict(re.findall(r"^(server|playground) +(\S+)$", demo.said, re.MULTILINE))
    assert addresses == {"server": demo.url, "playground": f"{demo.url}/playground"}
    assert "<title>Models" in httpx.get(addresses["playground"]).raise_for_status().text


def test_a_lora_is_trained_uploaded_and_used_in_the_next_request(demo: Demo) -> None:
    """The example as it stands: at scale 0 the picture is the plain one, at scale 1 it has the style."""
    command = under_exec(demo.url, sys.executable, ROOT / "examples/train_lora.py", TRAINED_STEPS)
    told = done(command, demo.environment, cwd=demo.folder, timeout_s=TIMEOUT_S)
    assert told.returncode == 0, told.stdout + told.stderr
    *_, plain, off, stripes = told.stdout.splitlines()
    assert plain == "out/lora-plain.jpg"
    assert off == "out/lora-off.jpg: 0 of 255 from the plain one"
    found = re.fullmatch(r"out/lora-stripes.jpg: (\d+) of 255 from the plain one", stripes)
    assert found and int(found[1]) > 3
    pictures = [demo.folder / "out" / f"lora-{name}.jpg" for name in ("plain", "off", "stripes")]
    assert [seen(each).style for each in pictures] == ["plain", "plain", "stripes"]
    assert {seen(each).colour for each in pictures} == {"blue"}
