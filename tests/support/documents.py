"""What README, docs/ and examples/README.md tell a reader to type."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_HERE = re.compile(r"<<-?'?(\w+)'?")

# What is not run, and why. Everything else is. The expressions are matched from the start of a command.
NOT_RUN = (
    (r"make demo", "installs; what it runs then: tests/serve/test_demo.py"),
    (r"make (test|check|bench)\b", "this is a part of the first; the others are run beside it"),
    (r"git clone|git checkout", "there is no repository to take it from, and this one stays as it is"),
    (r"\. \.venv/bin/activate", "the tests run in it"),
    (r"darkroom serve", "the server is there; its options are looked up"),
    (r"darkroom connect", "runs until it is stopped: tests/clients/test_connect.py"),
    (r"\. \./fal\.env", "what that prints: tests/clients/test_connect.py"),
    (r"darkroom exec .* -- npm run dev", "tests/clients/test_connect.py has a web application of its own"),
    (
        r"darkroom exec -- python examples/train_lora\.py",
        "minutes: tests/serve/test_demo.py, with a fifth of the steps",
    ),
    (r"export FAL_RUN_HOST", "wants a certificate of that name: tests/clients/test_connect.py"),
    (r"FAL_KEY=ID:SECRET python app\.py", "would call fal; the app is run under `darkroom exec`"),
    (r"darkroom zoo build", "hours: tests/unit/pipelines/test_zoo_training.py"),
    (r"darkroom manifests", "writes into cluster/: tests/unit/deployments/test_manifests.py"),
    (r"(darkroom run|curl \S+/run/)\S*\s?acme/", "tests/unit/deployments/test_added_endpoint.py, in a copy"),
    (r"curl \S+acme/", "tests/unit/deployments/test_added_endpoint.py, in a copy"),
    (r"python -m pytest", "tests/unit/deployments/test_added_endpoint.py, in a copy"),
    (r"python - <<", "asks the Hub"),
    (r"pip install", "the tests install nothing; the lock is checked by tests/architecture/test_lock.py"),
    (r"createdb", "tests/contract makes its databases by itself"),
    (r"docker ", "wants a Docker daemon: tests/cluster/test_images.py reads the Dockerfile"),
    (r"(\w+=\$\()?kubectl ", "wants a cluster: tests/cluster/test_docs.py"),
    (r"openssl ", "goes with a secret of a cluster"),
)
# What the tests may run without being told: nothing that changes more than the folder it is run in.
HARMLESS = ("darkroom ", "curl ")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. One with a title is a file of that name, or the input of the endpoint of that name."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a shell, continuation lines and all."""

    place: str
    text: str

    @property
    def why_not(self) -> str | None:
        """Why it is not run, if it is not."""
        return next((why for what, why in NOT_RUN if re.match(what, self.text)), None)


def blocks(*languages: str, pages: Sequence[Path] = PAGES) -> Iterator[Block]:
    for page in pages:
        text = page.read_text()
        for found in _BLOCK.finditer(text):
            if found[1] in languages:
                line = text.count("\n", 0, found.start()) + 1
                yield Block(str(page.relative_to(ROOT)), line, found[1], found[2] or "", found[3])


def commands() -> Iterator[Command]:
    """Every command of every shell block, in order."""
    for block in blocks("sh", "bash", "shell", "console"):
        yield from (Command(block.place, text) for text in _commands(block.text))


def _commands(text: str) -> Iterator[str]:
    lines = iter(text.splitlines())
    for line in lines:
        command = line
        while command.endswith("\\"):
            command = command[:-1].rstrip() + " " + next(lines).strip()
        if here := _HERE.search(command):
            for each in lines:
                command += f"\n{each}"
                if each == here[1]:
                    break
        if command.strip() and not command.lstrip().startswith("#"):
            yield command.strip()
