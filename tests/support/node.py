"""The JavaScript clients, as their lock file has them."""

import subprocess
from pathlib import Path

NODE = Path(__file__).parents[1] / "clients" / "node"


def install() -> Path:
    """The folder with them, installed unless they are there as the lock file says now."""
    lock, installed = NODE / "package-lock.json", NODE / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=NODE, check=True, timeout=300)
    return NODE
