"""FLUX.1-dev's real sizes, on the meta device: shapes without weights."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from pipelines.engine.sample import Sample
from pipelines.flux.attention import KeyValues
from pipelines.flux.controlnet import MODES, ControlUse
from pipelines.flux.easycontrol import Condition, EasyControl
from pipelines.flux.model import FluxModel
from pipelines.flux.plan import (
    Adapters,
    Attended,
    Conditioning,
    Denoising,
    FluxPlan,
    Guides,
    Reference,
)
from pipelines.flux.sampling import Grid, draw_noise, schedule
from pipelines.timed import Timed
from schemas.settings import ModelSettings
from tests.support import controlnets


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


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def test_every_guide_goes_through_the_real_transformer_in_its_shapes(full_size: FluxModel) -> None:
    """Union-pro's 5 + 10 blocks, a Redux picture's 729 tokens, an EasyControl of 512 pixels, a reference."""
    grid = Grid.of(1024, 768)
    text = Conditioning(meta(512 + 729, 4096), meta(768))
    with torch.device("meta"):
        union_pro = controlnets.empty(
            num_layers=5, num_single_layers=10, guidance_embeds=True, num_mode=10
        ).to(torch.bfloat16)
    bank = KeyValues(tuple((meta(1024, 24, 128), meta(1024, 24, 128)) for _ in range(19 + 38)))
    latents = full_size.to_device(meta(grid.tokens, 64))
    guides = Guides(
        meta(grid.tokens, 3072),
        (Timed(ControlUse(union_pro, meta(grid.tokens, 64), 0.7, meta(grid.tokens, 1), MODES["pose"])),),
        (Attended(Condition(meta(1024, 64), meta(1024, 3), EasyControl(()), 1.0), bank),),
        Timed(Reference(latents, latents, 0.65)),
    )
    guided = FluxPlan(grid, Denoising(text, schedule(28, 1.15), 3.5, Adapters(), guides))
    plain = FluxPlan(grid, Denoising(text, schedule(28, 1.15), 3.5))
    samples = [Sample(name, plan, latents) for name, plan in (("guided", guided), ("plain", plain))]
    with torch.inference_mode():
        predictions = full_size.predict(samples)
    assert [tuple(each.shape) for each in predictions] == [(grid.tokens, 64)] * 2
    assert sum(each.numel() for each in union_pro.parameters()) / 1e9 == pytest.approx(3.30, abs=0.01)
