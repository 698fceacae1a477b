"""Ray's own ports: what listens, and who is let in."""

import os
import subprocess
import sys
from pathlib import Path

from deployments.server import DEFAULT_ENVIRONMENT
from tests.support.server import ROOT, Server

JOIN = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(ray.cluster_resources())"


def joined(server: Server, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A stranger's program that would run code on the server's Ray."""
    return subprocess.run(
        [sys.executable, "-c", JOIN, server.ray_address],
        env={**os.environ, "HOME": str(home), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_t36_ray_takes_no_one_without_its_token(server: Server, tmp_path: Path) -> None:
    assert DEFAULT_ENVIRONMENT["RAY_AUTH_MODE"] == "token"
    for environment in (
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    ):
        stranger = joined(server, tmp_path, **environment)
        assert stranger.returncode != 0
        assert "CPU" not in stranger.stdout


def test_t36_no_dashboard_listens(server: Server) -> None:
    inodes = {
        os.readlink(link)
        for pid in server.pids("dashboard")
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink()
    }
    listening = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    ports = {int(row[1].rpartition(":")[2], 16) for row in listening if f"socket:[{row[9]}]" in inodes}
    assert 8265 not in ports
