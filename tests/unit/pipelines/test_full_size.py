"""FLUX.1-dev's real sizes, on the meta device: shapes without weights."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from pipelines.engine.sample import Sample
from pipelines.flux.model import FluxModel
from pipelines.flux.plan import Conditioning, Denoising, FluxPlan
from pipelines.flux.sampling import Grid, draw_noise, schedule
from schemas.settings import ModelSettings


@pytest.fixture(scope="module")
def full_size() -> FluxModel:
    with torch.device("meta"):
        parts = SimpleNamespace(
            transformer=FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16),
            text_encoder=CLIPTextModel(CLIPTextConfig()),
            text_encoder_2=T5EncoderModel(
                T5Config(
                    d_model=4096,
                    d_kv=64,
                    d_ff=10240,
                    num_layers=24,
                    num_heads=64,
                    feed_forward_proj="gated-gelu",
                )
            ),
        )
    settings = ModelSettings(model="full size", endpoints=("any",), dtype="bfloat16")
    return FluxModel(parts, settings)


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1024, 576), (2048, 2048)])
def test_a_batch_goes_through_the_real_transformer_in_its_shapes(
    full_size: FluxModel, width: int, height: int
) -> None:
    grid = Grid.of(width, height)
    text = Conditioning(
        torch.empty(512, 4096, dtype=torch.bfloat16, device="meta"),
        torch.empty(768, dtype=torch.bfloat16, device="meta"),
    )
    plan = FluxPlan(grid, Denoising(text, schedule(28, 1.15), 3.5))
    samples = [Sample(str(seed), plan, full_size.to_device(draw_noise(grid, seed))) for seed in range(2)]
    predictions = full_size.predict(samples)
    assert [tuple(each.shape) for each in predictions] == [(width * height // 256, 64)] * 2
    assert {each.dtype for each in predictions} == {torch.float32}


def test_every_linear_layer_may_carry_a_lora(full_size: FluxModel) -> None:
    counts = {
        part: sum(name.startswith(f"{part}.") for name in full_size.targets)
        for part in ("transformer", "text_encoder", "text_encoder_2")
    }
    assert counts == {"transformer": 504, "text_encoder": 72, "text_encoder_2": 168}
