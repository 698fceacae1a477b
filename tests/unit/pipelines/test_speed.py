"""What speed rests on where there is no GPU: artefacts, kernels, memory formats, the compiled decoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from pipelines import vae
from pipelines.adapters.bank import LoraBank, LoraUse
from pipelines.adapters.lora import Lora, LoraLayer
from pipelines.speed import artefacts, attention, regions
from pipelines.speed.captures import Captures
from pipelines.speed.denoiser import Denoiser, channels_last, staged_rows
from schemas.settings import SpeedSettings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_artefacts_lie_apart_by_torch_device_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(artefacts.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    path = artefacts.keep_in(str(tmp_path), GPU, "black-forest-labs/FLUX.1-dev")
    assert path == tmp_path / f"torch-{torch.__version__}" / "NVIDIA-H200" / "black-forest-labs-FLUX.1-dev"
    assert path.is_dir()
    # what is set counts, also for the next model of the process
    assert artefacts.keep_in(str(tmp_path), CPU, "another") == path


def test_nothing_is_done_for_speed_unless_the_operator_says_so() -> None:
    usual = SpeedSettings()
    assert (usual.compile, usual.graphs, usual.attention) == ("none", "none", "sdpa")
    assert (usual.quantisation, usual.acceleration) == ("none", "none")
    assert not (usual.channels_last or usual.compile_vae or usual.compiles)
    assert staged_rows(usual, 4096) == 0
    assert staged_rows(SpeedSettings(compile="regional"), 4096) == 256


def test_graphs_without_compiled_blocks_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"speed\.graphs: auto needs compile: regional"):
        SpeedSettings(graphs="auto")


def test_the_kernel_that_runs_is_told_and_the_order_of_others_kept() -> None:
    assert attention.put_fastest_first((1, 2, 64, 16), torch.float32, CPU) in ("sdpa (flash)", "sdpa (math)")
    before = torch._C._get_sdp_priority_order()
    try:
        attention.put_first(["efficient", "math"])
        first, second, *rest = torch._C._get_sdp_priority_order()
        assert (first, second) == (int(SDPBackend.EFFICIENT_ATTENTION), int(SDPBackend.MATH))  # type: ignore[call-overload]
        assert rest == [each for each in before if each not in (first, second)]
    finally:
        torch._C._set_sdp_priority_order(before)


def test_convolutions_go_channels_last() -> None:
    layer = nn.Conv2d(4, 8, 3)
    channels_last(layer)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_captured_without_a_gpu() -> None:
    captures = Captures(CPU)
    captures.capture("key", lambda inputs: inputs["x"] + 1, {"x": torch.zeros(2)})
    assert len(captures) == 0


class Block(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.conv(x)))


class Net(nn.Module):
    """Called as diffusers' models are."""

    device = CPU

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.blocks(x),)


def test_compiled_convolutions_take_loras_row_by_row_and_a_late_graph_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(regions, "BACKEND", "aot_eager")

    def make(**speed: Any) -> Denoiser:
        torch.manual_seed(0)
        net = Net().requires_grad_(False)
        targets = {
            name: each for name, each in net.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)
        }
        options = SpeedSettings(**speed)
        bank = LoraBank(targets, 16, staged_rows=staged_rows(options, 4 * 16))
        draw = torch.Generator().manual_seed(1)
        for name, rank in (("a", 3), ("b", 7)):
            layers = {
                key: LoraLayer(
                    torch.randn(rank, *each.weight.shape[1:], generator=draw) / 8,
                    torch.randn(len(each.weight), rank, generator=draw) / 8,
                )
                for key, each in targets.items()
            }
            bank.hold({name: Lora(layers)})
        return Denoiser(net, bank, ("Block",), options)

    plain, fast = make(), make(compile="regional")
    a, b = LoraUse("a", 0.5), LoraUse("b", -1.0)
    told = []
    for uses in ([[a], []], [[b], [a, b], []], [[], [b], [a], [a]], [[b], [b]]):
        inputs = {"x": torch.randn(len(uses), 4, 5, 6, generator=torch.Generator().manual_seed(len(uses)))}
        caplog.clear()
        with torch.inference_mode():
            with plain.steered(uses, is_usual=True):
                expected = plain(inputs)
            with fast.steered(uses, is_usual=True):
                torch.testing.assert_close(fast(inputs), expected, atol=1e-5, rtol=1e-5)
        told.append("graphs that the warm-up did not make" in caplog.text)
    assert told == [True, False, False, False]  # nobody warmed it


def test_a_compiled_decoder_makes_the_same_picture_in_every_size(
    flux_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "BACKEND", "eager")
    plain, fast = (AutoencoderKL.from_pretrained(flux_folder, subfolder="vae") for _ in range(2))
    vae.compile_decoder(fast)
    channels_last(fast)
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for size in ((6, 8), (9, 4)):
            latents: Any = torch.randn(16, *size, generator=draw)
            torch.testing.assert_close(
                vae.decode(fast, latents), vae.decode(plain, latents), atol=1e-4, rtol=1e-4
            )
        # the copy in float32 that a picture beyond half precision needs runs its own layers
        fast.half()
        loud = torch.full((16, 4, 4), 3e4)
        torch.testing.assert_close(vae.decode(fast, loud), vae.decode(plain, loud), atol=0.5, rtol=0.1)
