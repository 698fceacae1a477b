"""Where the models of the settings are."""

from pathlib import Path

from pipelines import zoo


def locate(name: str) -> Path | str:
    """`zoo:NAME` → its folder, built when absent; a folder or file → itself; anything else is a Hub id."""
    if name.startswith("zoo:"):
        return zoo.locate(name.removeprefix("zoo:"))
    path = Path(name).expanduser()
    return path if path.exists() else name
