"""Linear layers in float8: beside what they stand for, under LoRAs, and without hardware for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipelines.adapters.bank import LoraBank, LoraUse
from pipelines.adapters.lora import Lora, LoraLayer
from pipelines.flux.model import FluxModel
from pipelines.sd.model import SdModel
from pipelines.speed import fp8
from pipelines.speed.fp8 import Float8Linear, Unsupported, check_device, quantise
from schemas.settings import ModelSettings, SpeedSettings
from tests.unit.pipelines.test_speed_flux import predict, sample


class Block(nn.Module):
    """Two layers that fit, one that does not, and a modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.Sequential(nn.Linear(32, 64))
        self.a, self.b, self.odd = nn.Linear(32, 48), nn.Linear(48, 32, bias=False), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.tanh(self.a(x)))
        return y


def make(dtype: torch.dtype = torch.bfloat16) -> Block:
    torch.manual_seed(0)
    return Block().to(dtype).requires_grad_(False)


def inputs(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    # rows of very different sizes: each has a scale of its own
    sizes = torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    return (torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)) * sizes).to(dtype)


def off(ours: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


def test_the_layers_of_blocks_that_fit_become_float8_and_no_others() -> None:
    block = make()
    assert quantise(nn.Sequential(block), ("Block",)) == 2
    assert {name for name, each in block.named_modules() if isinstance(each, Float8Linear)} == {"a", "b"}
    assert block.a.weight.dtype == torch.float8_e4m3fn
    assert block.norm1[0].weight.dtype == torch.bfloat16


def test_it_multiplies_what_was_rounded_and_nothing_else() -> None:
    plain, block = make(torch.float32), make(torch.float32)
    quantise(block, ("Block",))
    x = inputs(torch.float32)
    weight, weight_scale = fp8.to_float8(plain.a.weight)
    rows, scale = fp8.to_float8(x.view(-1, 32))
    by_hand = (rows.float() * scale) @ (weight.float() * weight_scale).t() + plain.a.bias
    torch.testing.assert_close(block.a(x).view(-1, 48), by_hand, atol=1e-5, rtol=1e-5)


def test_every_row_is_near_the_layer_it_stands_for() -> None:
    plain, block = make(), make()
    quantise(block, ("Block",))
    x = inputs().repeat(1, 1, 2)[..., :48]
    for ours, expected in zip(block.b(x), plain.b(x), strict=True):  # of one call
        assert off(ours, expected) < 0.05
    zeros = torch.zeros(2, 32, dtype=torch.bfloat16)
    assert torch.equal(block.a(zeros), plain.a(zeros))


@pytest.mark.parametrize("staged", [False, True])
def test_a_lora_beside_float8_reads_and_adds_in_full(staged: bool) -> None:
    block, bare = make(), make()
    quantise(block, ("Block",))
    quantise(bare, ("Block",))
    bank = LoraBank({"a": block.a}, 8, staged_rows=3 if staged else 0)
    draw = torch.Generator().manual_seed(2)
    lora = LoraLayer(torch.randn(4, 32, generator=draw), torch.randn(48, 4, generator=draw))
    bank.hold({"x": Lora({"a": lora})})
    x = inputs()
    with torch.inference_mode(), bank.rows([[LoraUse("x", 0.5)], [], []], staged=staged):
        ours = block.a(x)
    expected = bare.a(x)
    expected[0] += 0.5 * (x[0] @ lora.down.t().bfloat16()) @ lora.up.t().bfloat16()
    assert off(ours[0], expected[0]) < 0.01
    assert torch.equal(ours[1:], expected[1:])


def test_torch_compile_follows_it() -> None:
    block = make()
    quantise(block, ("Block",))
    compiled: Any = torch.compile(block.a, fullgraph=True, backend="aot_eager", dynamic=True)
    x = inputs()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), block.a(x))


def test_hardware_without_float8_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(torch.device("cpu"))

    def cannot(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError(
            "torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0"
        )

    monkeypatch.setattr(torch, "_scaled_mm", cannot)
    with pytest.raises(Unsupported, match=r"speed\.quantisation: fp8 does not run on cpu: .*>= 9\.0"):
        check_device(torch.device("cpu"))


def test_other_dtypes_and_families_are_refused_at_the_start(flux_folder: Path) -> None:
    speed = SpeedSettings(quantisation="fp8")
    with pytest.raises(ValidationError, match="needs dtype: bfloat16, not float32"):
        ModelSettings(model="any", endpoints=("any",), speed=speed)
    lossy = (speed, "quantisation: fp8"), (SpeedSettings(acceleration="high"), "acceleration: high")
    for wish, told in lossy:
        options = ModelSettings(model="any", endpoints=("any",), dtype="bfloat16", speed=wish)
        with pytest.raises(ValueError, match=f"speed.{told} is for FLUX"):
            SdModel(options, "any")


def test_flux_in_float8_says_so_and_stays_near(flux_folder: Path) -> None:
    def load(quantisation: str) -> FluxModel:
        speed = SpeedSettings.model_validate({"quantisation": quantisation})
        options = ModelSettings(
            model=str(flux_folder), endpoints=("any",), dtype="bfloat16", max_sequence_length=32, speed=speed
        )
        return FluxModel.load(options, Path)

    plain, narrow = load("none"), load("fp8")
    assert (plain.float8_layers, plain.precision) == (0, None)
    assert narrow.float8_layers == 34  # 12 in each double block, 5 in each single one
    assert narrow.precision == "float8 (34 layers) and bfloat16"

    def bfloat16(seed: int) -> Any:
        made = sample(seed)
        leg = made.plan._legs[0]  # type: ignore[attr-defined]
        text = leg.conditioning
        object.__setattr__(text, "tokens", text.tokens.bfloat16())
        object.__setattr__(text, "pooled", text.pooled.bfloat16())
        return made

    assert 0 < off(predict(narrow, bfloat16(0)), predict(plain, bfloat16(0))) < 0.1
