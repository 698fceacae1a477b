"""Stable Diffusion compiled gives what it gives by itself, with ControlNets in mixed rows."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from pipelines import zoo
from pipelines.engine.sample import Sample
from pipelines.sd.controlnet import ControlUse
from pipelines.sd.grid import Grid
from pipelines.sd.model import SdModel
from pipelines.sd.plan import Prompting, SdPlan, Side
from pipelines.sd.schedule import Schedule
from pipelines.sd.text import Encoding
from pipelines.speed import regions
from pipelines.speed.regions import graphs
from pipelines.timed import Timed
from schemas.settings import ModelSettings, PictureSize, SpeedSettings

# one level: as few kinds of blocks as a UNet of SDXL can have, for each takes seconds to trace
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 64,
    "attention_head_dim": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}


@pytest.fixture(scope="module")
def folder(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the SDXL kind, and a ControlNet for it below `controlnet`."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(
        zoo.locate("sdxl", flux_folder.parent),
        folder,
        ignore=shutil.ignore_patterns("unet"),
        dirs_exist_ok=True,
    )
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.05)  # it begins with zeros, that control nothing
    unet.save_pretrained(folder / "unet")
    net.save_pretrained(folder / "controlnet")
    return folder


def load(folder: Path, **speed: Any) -> SdModel:
    options = ModelSettings(
        model=str(folder),
        controlnet=str(folder / "controlnet"),
        endpoints=("any",),
        lora_rank=0,  # tracing what LoRAs add takes as long again; see test_speed.py
        speed=SpeedSettings(
            sizes=(PictureSize(width=80, height=64),), rows=(1,), cache=str(folder / "compiled"), **speed
        ),
    )
    return SdModel.load(options, Path)


def sample(model: SdModel, seed: int, grid: Grid, *, guidance: float, control: bool) -> Sample:
    draw = torch.Generator().manual_seed(seed)
    side = [Encoding(torch.randn(77, 64, generator=draw), torch.randn(32, generator=draw)) for _ in range(2)]
    image = torch.rand(3, grid.height, grid.width, generator=draw)
    controls = (Timed(ControlUse(model.controlnet, image, 0.7)),) if control else ()
    prompting = Prompting(Side(side[0], controls), Side(side[1]), guidance)
    steps = Schedule.build(None, model.base.scheduler_config, 4 + seed, seed=seed)
    noise = torch.randn(4, grid.rows, grid.columns, generator=draw)
    return Sample(str(seed), SdPlan(model.base, grid, prompting, steps), noise)


def test_compiled_blocks_give_what_they_give_by_themselves_and_wait_for_no_graph(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(regions, "BACKEND", "eager")
    plain, compiled = load(folder), load(folder, compile="regional", channels_last=True)
    compiled.warm()
    before = graphs()

    def predict(model: SdModel) -> list[Tensor]:
        wide, small = Grid(8, 10), Grid(16, 8)
        batches = [
            [sample(model, 0, wide, guidance=1, control=False)],
            [
                sample(model, 1, small, guidance=5, control=True),
                sample(model, 2, small, guidance=1, control=False),
            ],
            [sample(model, 3, wide, guidance=1, control=True)],
        ]
        with torch.inference_mode():
            return [torch.stack(list(model.predict(batch))) for batch in batches]

    with caplog.at_level(logging.WARNING, "pipelines.speed"):
        for ours, theirs in zip(predict(compiled), predict(plain), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert graphs() == before
    assert not [each for each in caplog.records if each.name.startswith("pipelines")]
