"""The benchmark of a GPU runs to its end at tiny size, so that a run on a card is not its first."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (
            "flux",
            {
                "diffusers",
                "ours",
                "a picture, bf16",
                "3 LoRA of rank 4",
                "switch, rank 4",
            },
        ),
        ("sdxl", {"diffusers, a step with guidance", "ours", "ours, ControlNet"}),
        ("sd15", {"ours", "ours, a picture of 30 steps"}),
    ],
)
def test_every_part_runs_and_tells(
    part: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr(gpu, "FLUX_STEPS", 12)
    monkeypatch.setattr(gpu, "SKIPPED", 3)
    file = tmp_path / "rows.json"
    gpu.main(["--tiny", "--part", part, "--json", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["what"] for row in rows} >= expected
    assert all(row["ms"] > 0 for row in rows)
