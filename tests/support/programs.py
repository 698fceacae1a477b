"""Programs under `darkroom exec`."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def under_exec(server: str, *command: str | Path, options: Sequence[str] = ()) -> list[str]:
    """The command line that runs `command` with `server` in fal's place."""
    darkroom = [sys.executable, "-m", "deployments.cli", "exec", "--server", server, *options]
    return [*darkroom, "--", *map(str, command)]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Ours without what would reach or unlock fal, the authority's folder below `folder`."""
    dropped = ("FAL_", "DARKROOM_", "HTTPS_PROXY", "https_proxy", "NODE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(folder)} | variables


def done(
    command: Sequence[str], variables: Mapping[str, str], cwd: Path = ROOT, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run to the end, whatever the exit code is."""
    return subprocess.run(
        command, cwd=cwd, env=dict(variables), capture_output=True, text=True, timeout=timeout_s
    )
