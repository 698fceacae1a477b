"""What docs/how-to/add-an-endpoint.md tells, done to a copy of the project: one endpoint more.

    python examples/add_endpoint.py out/with-sticker
    cd out/with-sticker && PYTHONPATH=. python -m deployments.cli serve

The page's blocks with a title are files: of Python those to write, of `diff` those to add lines to.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "add-an-endpoint.md"
PARTS = (
    *("schemas", "pipelines", "deployments", "tests", "benchmarks", "examples"),
    *("serve_config.yaml", "pyproject.toml"),
)
_BLOCK = re.compile(r'^```(python|diff) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def copied(folder: Path) -> None:
    """The project without what was installed or made in it. Raises FileExistsError."""
    folder.mkdir(parents=True)
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("node_modules", "__pycache__")
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, folder)


def followed(page: Path, folder: Path) -> list[Path]:
    """Do what the page says; returns the files written or changed, in its order."""
    changed = []
    for language, name, text in _BLOCK.findall(page.read_text()):
        file = folder / name
        file.write_text(text if language == "python" else added(file.read_text(), text))
        changed.append(file)
    return changed


def added(text: str, diff: str) -> str:
    """`text` with the lines marked + after the others, which it has once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line.startswith(" "))
    assert text.count(before) == 1, f"the file does not have this once:\n{before}"
    return text.replace(before, "".join(line[1:] for line in lines))


def main() -> None:
    folder = Path(sys.argv[1])
    copied(folder)
    for file in followed(PAGE, folder):
        print(file)


if __name__ == "__main__":
    main()
