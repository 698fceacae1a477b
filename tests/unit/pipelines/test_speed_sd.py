"""Stable Diffusion compiled gives what it gives by itself, with ControlNets and LoRAs in mixed rows."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines import zoo
from pipelines.adapters.bank import LoraUse
from pipelines.adapters.lora import Lora, LoraLayer
from pipelines.engine.sample import Sample
from pipelines.sd.controlnet import ControlUse
from pipelines.sd.grid import Grid
from pipelines.sd.model import SdModel
from pipelines.sd.plan import Prompting, SdPlan, Side
from pipelines.sd.schedule import Schedule
from pipelines.sd.text import Encoding
from pipelines.speed.regions import graphs
from pipelines.timed import Timed
from schemas.settings import ModelSettings, PictureSize, SpeedSettings


def load(folder: Path, **speed: Any) -> SdModel:
    sources = {name: zoo.locate(name, folder.parent) for name in ("sdxl", "sdxl-canny")}
    options = ModelSettings(
        model="sdxl",
        controlnet="sdxl-canny",
        endpoints=("any",),
        lora_rank=16,
        speed=SpeedSettings(
            sizes=(PictureSize(width=80, height=64),), rows=(1,), cache=str(folder / "compiled"), **speed
        ),
    )
    return SdModel.load(options, lambda name: sources[name])


def sample(model: SdModel, seed: int, grid: Grid, *loras: LoraUse, guidance: float, control: bool) -> Sample:
    draw = torch.Generator().manual_seed(seed)
    side = [Encoding(torch.randn(77, 64, generator=draw), torch.randn(32, generator=draw)) for _ in range(2)]
    image = torch.rand(3, grid.height, grid.width, generator=draw)
    controls = (Timed(ControlUse(model.controlnet, image, 0.7)),) if control else ()
    prompting = Prompting(Side(side[0], controls), Side(side[1]), guidance)
    steps = Schedule.build(None, model.base.scheduler_config, 4 + seed, seed=seed)
    noise = torch.randn(4, grid.rows, grid.columns, generator=draw)
    return Sample(str(seed), SdPlan(model.base, grid, prompting, steps, loras), noise)


def lora(model: SdModel) -> Lora:
    draw = torch.Generator().manual_seed(0)
    return Lora(
        {
            name: LoraLayer(
                torch.randn(4, *inner, generator=draw) / 8, torch.randn(out, 4, generator=draw) / 8
            )
            for name, (out, *inner) in model.base.targets.items()
            if name.startswith("unet.")
        }
    )


def test_compiled_blocks_give_what_they_give_by_themselves_and_wait_for_no_graph(
    flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, compiled = load(flux_folder), load(flux_folder, compile="regional", backend="eager")
    compiled.warm()
    before = graphs()

    def predict(model: SdModel) -> list[Tensor]:
        used = LoraUse("x", 0.5)
        wide, small = Grid(8, 10), Grid(16, 8)
        batches = [
            [sample(model, 0, wide, guidance=1, control=False)],
            [
                sample(model, 1, small, used, guidance=5, control=True),
                sample(model, 2, small, guidance=1, control=False),
            ],
            [sample(model, 3, wide, used, guidance=1, control=True)],
        ]
        with torch.inference_mode(), model.base.holding({"x": lora(model)}):
            return [torch.stack(list(model.predict(batch))) for batch in batches]

    with caplog.at_level(logging.WARNING, "pipelines.speed"):
        for ours, theirs in zip(predict(compiled), predict(plain), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert graphs() == before
    assert not [each for each in caplog.records if each.name.startswith("pipelines")]
    assert compiled.effective["compiled"] == "blocks"
