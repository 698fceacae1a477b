"""LoRA banks: adapters beside the weights, row by row."""

from collections.abc import Collection, Sequence
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipelines.adapters.bank import LoraBank, LoraUse
from pipelines.adapters.lora import Lora, LoraLayer
from schemas.errors import AssetError

# the shapes of the weights
TARGETS = {"a": (8, 6), "c": (5, 8, 3, 3), "d": (8, 5, 1, 1), "b": (4, 8)}


class Net(nn.Module):
    """A linear layer over a picture's tokens, two convolutions, and a linear layer again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.c, self.d = nn.Conv2d(8, 5, 3, stride=(1, 2), padding=(2, 1), dilation=2), nn.Conv2d(5, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        picture = torch.tanh(self.a(x)).mT.reshape(*x.shape[:-2], 8, 4, 5)
        tokens = torch.tanh(self.d(torch.tanh(self.c(picture)))).flatten(-2).mT
        y: Tensor = self.b(tokens)
        return y


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def make_bank(net: Net, rank: int = 16) -> LoraBank:
    return LoraBank({name: getattr(net, name) for name in TARGETS}, rank)


def make_lora(
    seed: int, rank: int = 3, targets: Collection[str] = TARGETS.keys(), biased: Collection[str] = ()
) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in targets:
        out, *inner = TARGETS[name]
        layers[name] = LoraLayer(
            torch.randn(rank, *inner, generator=generator),
            torch.randn(out, rank, generator=generator),
            torch.randn(out, generator=generator) if name in biased else None,
        )
    return Lora(layers)


def merged(net: Net, wishes: Sequence[tuple[Lora, LoraUse]]) -> Net:
    """A copy with W + Σ scale · up · down and b + Σ scale · bias."""
    copy = make_net()
    copy.load_state_dict(net.state_dict())
    for lora, use in wishes:
        for name, layer in lora.layers.items():
            module, scale = getattr(copy, name), use.layers.get(name, use.scale)
            module.weight += scale * torch.tensordot(layer.up, layer.down, 1)
            if layer.bias is not None:
                module.bias += scale * layer.bias
    return copy


def run(net: Net, bank: LoraBank, x: Tensor, rows: Sequence[Sequence[LoraUse]]) -> Tensor:
    with torch.inference_mode(), bank.rows(rows):
        y: Tensor = net(x)
        return y


def inputs() -> Tensor:
    return torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def x() -> Tensor:
    return inputs()


def test_each_row_gets_its_own_adapters_as_if_they_were_merged(x: Tensor) -> None:
    net = make_net()
    bank = make_bank(net)
    loras = {str(seed): make_lora(seed, rank=seed + 1) for seed in range(3)}
    bank.hold(loras)
    rows = [[LoraUse("0", 0.7)], [], [LoraUse("1", -1.5), LoraUse("2", 2.0)]]
    ours = run(net, bank, x, rows)
    for index, uses in enumerate(rows):
        alone = merged(net, [(loras[use.name], use) for use in uses])(x[index])
        torch.testing.assert_close(ours[index], alone, atol=1e-5, rtol=1e-5)


scales = st.floats(-4, 4, width=32)
uses = st.builds(
    LoraUse,
    st.sampled_from("0123"),
    scales,
    st.dictionaries(st.sampled_from([*TARGETS, "elsewhere"]), scales),
)


@settings(max_examples=100)
@given(st.lists(st.lists(uses, max_size=3), min_size=3, max_size=3))
def test_any_scales_layers_and_biases_act_as_if_they_were_merged(rows: list[list[LoraUse]]) -> None:
    net, x = make_net(), inputs()
    bank = make_bank(net)
    loras = {
        "0": make_lora(0, biased=TARGETS),
        "1": make_lora(1, rank=2, biased=["b", "c"]),
        "2": make_lora(2, rank=4, targets=["a", "d"], biased=["a"]),
        "3": make_lora(3, rank=1),
    }
    bank.hold(loras)
    ours = run(net, bank, x, rows)
    for index, each in enumerate(rows):
        alone = merged(net, [(loras[use.name], use) for use in each])(x[index])
        torch.testing.assert_close(ours[index], alone, atol=1e-3, rtol=1e-4)
    assert all(torch.equal(ours[index], net(x)[index]) for index, each in enumerate(rows) if not each)


@settings(max_examples=20)
@given(scales)
def test_the_same_scale_at_every_layer_is_that_scale_to_the_bit(scale: float) -> None:
    net, x = make_net(), inputs()
    bank = make_bank(net)
    bank.hold({"0": make_lora(0, biased=["a"])})
    by_layer = LoraUse("0", layers=dict.fromkeys(TARGETS, scale))
    assert torch.equal(run(net, bank, x, [[by_layer]] * 3), run(net, bank, x, [[LoraUse("0", scale)]] * 3))


@pytest.mark.parametrize("layer", TARGETS)
def test_a_layer_at_zero_is_a_file_without_it_to_the_bit(x: Tensor, layer: str) -> None:
    whole = make_lora(0, biased=TARGETS)
    without = Lora({name: each for name, each in whole.layers.items() if name != layer})
    answers = []
    for lora, layers in ((whole, {layer: 0.0}), (without, {})):
        net = make_net()
        bank = make_bank(net)
        bank.hold({"0": lora})
        answers.append(run(net, bank, x, [[LoraUse("0", 0.7, layers)]] * 3))
    assert torch.equal(*answers)


def test_the_layers_of_another_bank_mean_nothing(x: Tensor) -> None:
    net = make_net()
    bank = make_bank(net)
    bank.hold({"0": make_lora(0)})
    elsewhere = LoraUse("0", 0.7, {"text_encoder.fc1": 3.0})
    assert torch.equal(run(net, bank, x, [[elsewhere]] * 3), run(net, bank, x, [[LoraUse("0", 0.7)]] * 3))


def test_an_evicted_bias_does_not_act(x: Tensor) -> None:
    net = make_net()
    bank = make_bank(net, rank=8)
    for name in ("first", "second"):
        bank.hold({name: make_lora(0, rank=4, biased=TARGETS)})
    bank.release(["first", "second"])
    wide = make_lora(1, rank=6)  # over both
    bank.hold({"wide": wide})
    use = LoraUse("wide")
    ours = run(net, bank, x, [[use]] * 3)
    torch.testing.assert_close(ours, merged(net, [(wide, use)])(x), atol=1e-5, rtol=1e-5)


def test_an_adapter_without_layers_here_takes_no_bias_away(x: Tensor) -> None:
    net = make_net()
    bank = make_bank(net)
    lora, use = make_lora(0, biased=TARGETS), LoraUse("0")
    bank.hold({"0": lora})
    bank.hold({"elsewhere": Lora({})})  # of no rank, so it fits anywhere
    ours = run(net, bank, x, [[use, LoraUse("elsewhere")]] * 3)
    torch.testing.assert_close(ours, merged(net, [(lora, use)])(x), atol=1e-5, rtol=1e-5)


def test_the_order_of_adapters_means_nothing(x: Tensor) -> None:
    net = make_net()
    bank = make_bank(net)
    bank.hold({"0": make_lora(0), "1": make_lora(1)})
    uses = [LoraUse("0", 0.5), LoraUse("1", 1.0)]
    torch.testing.assert_close(run(net, bank, x, [uses] * 3), run(net, bank, x, [uses[::-1]] * 3))


def test_the_same_adapter_twice_adds_up(x: Tensor) -> None:
    net = make_net()
    bank = make_bank(net)
    bank.hold({"0": make_lora(0)})
    twice = run(net, bank, x, [[LoraUse("0", 0.5), LoraUse("0", 0.25)]] * 3)
    torch.testing.assert_close(twice, run(net, bank, x, [[LoraUse("0", 0.75)]] * 3))


def test_scale_zero_and_no_adapter_are_the_base_to_the_bit(x: Tensor) -> None:
    net = make_net()
    base = net(x)
    bank = make_bank(net)
    bank.hold({"0": make_lora(0)})
    assert torch.equal(run(net, bank, x, [[]] * 3), base)
    assert torch.equal(run(net, bank, x, [[LoraUse("0", 0.0)]] * 3), base)
    assert torch.equal(net(x), base)  # and outside of any rows


def test_an_adapter_of_some_layers_leaves_the_others(x: Tensor) -> None:
    net = make_net()
    bank = make_bank(net)
    lora = make_lora(0, targets=["b"])
    bank.hold({"0": lora})
    torch.testing.assert_close(
        run(net, bank, x, [[LoraUse("0", 1.0)]] * 3),
        merged(net, [(lora, LoraUse("0", 1.0))])(x),
        atol=1e-5,
        rtol=1e-5,
    )


def test_what_an_evicted_adapter_left_behind_does_not_act(x: Tensor) -> None:
    net = make_net()
    bank = make_bank(net, rank=4)
    bank.hold({"big": make_lora(0, rank=4)})
    bank.release(["big"])
    small = make_lora(1, rank=2, targets=["b"])
    bank.hold({"small": small})  # in the place of the big one
    torch.testing.assert_close(
        run(net, bank, x, [[LoraUse("small", 1.0)]] * 3),
        merged(net, [(small, LoraUse("small", 1.0))])(x),
        atol=1e-5,
        rtol=1e-5,
    )


def test_the_least_recently_used_idle_adapter_makes_room() -> None:
    bank = make_bank(make_net(), rank=8)
    for name in "xy":
        bank.hold({name: make_lora(0, rank=4)})
        bank.release([name])
    bank.hold({"x": make_lora(0, rank=4)})  # used again
    bank.hold({"z": make_lora(0, rank=4)})
    assert set(bank._residents) == {"x", "z"}


def test_more_than_the_bank_holds_is_refused_with_both_numbers() -> None:
    bank = make_bank(make_net(), rank=8)
    with pytest.raises(AssetError, match=r"rank 9 .* 8"):
        bank.hold({"0": make_lora(0, rank=4), "1": make_lora(1, rank=5)})
    assert bank.pins == 0


def test_a_hold_waits_until_there_is_room_even_across_fragments() -> None:
    bank = make_bank(make_net(), rank=8)
    bank.hold({"left": make_lora(0, rank=3)})
    bank.hold({"middle": make_lora(1, rank=2)})
    waiting = Thread(
        target=bank.hold, args=({"middle": make_lora(1, rank=2), "large": make_lora(2, rank=6)},)
    )
    waiting.start()
    bank.release(["left"])  # not enough: the middle splits what is free
    assert "large" not in bank._residents
    bank.release(["middle"])
    waiting.join(10)
    assert set(bank._residents) == {"middle", "large"}
    bank.check_integrity()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=40))
def test_places_never_overlap_whatever_is_held_and_released(moves: list[tuple[int, bool]]) -> None:
    bank = make_bank(make_net(), rank=8)
    held: list[str] = []
    for number, hold in moves:
        name = str(number)
        if hold and len(held) < 2:  # two of rank 2 fit however they lie
            bank.hold({name: make_lora(number, rank=1 + number % 2)})
            held.append(name)
        elif not hold and held:
            bank.release([held.pop()])
        bank.check_integrity()
        assert bank.pins == len(held)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 3), "padding": "same"},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "circular"},
        {"kernel_size": 2, "stride": (2, 1), "bias": False},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_a_convolution_gets_what_one_with_its_settings_adds(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, **options).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(2, *convolution.weight.shape[1:], generator=generator)
    up, bias = torch.randn(6, 2, generator=generator), torch.randn(6, generator=generator)
    bank = LoraBank({"it": convolution}, rank=4)
    bank.hold({"other": Lora({"it": LoraLayer(up.new_zeros(1, *down.shape[1:]), up[:, :1])})})
    bank.hold({"0": Lora({"it": LoraLayer(down, up, bias)})})
    x = torch.randn(2, 4, 7, 9, generator=generator)

    with torch.inference_mode():
        plain = convolution(x)
        with bank.rows([[LoraUse("0", 0.5)], [LoraUse("other")]]):
            ours = convolution(x)
        convolution.weight += 0.5 * torch.tensordot(up, down, 1)
        expected = convolution(x)[0] + 0.5 * bias[:, None, None]

    torch.testing.assert_close(ours[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], plain[1])


def test_t30_an_adapter_that_overflows_leaves_the_other_rows_as_they_are() -> None:
    net = make_net()
    bank = make_bank(net)
    x = torch.randn(2, 20, 6)
    plain = net(x)
    loud = Lora(
        {name: LoraLayer(layer.down * 1e38, layer.up, None) for name, layer in make_lora(1).layers.items()}
    )
    bank.hold({"loud": loud})
    with bank.rows([[LoraUse("loud")], []]):
        mixed = net(x * 100)
    assert not mixed[0].isfinite().all()
    torch.testing.assert_close(mixed[1], net(x * 100)[1])
    assert plain.isfinite().all()


def test_t30_values_that_the_dtype_cannot_hold_are_refused_and_leave_nothing_behind() -> None:
    net = make_net().half()
    bank = make_bank(net)
    huge = Lora({"a": LoraLayer(torch.full((3, 6), 1e5), torch.ones(8, 3), None)})
    with pytest.raises(AssetError, match="beyond 65504"):
        bank.hold({"good": make_lora(1), "huge": huge})
    assert (bank.names, bank.pins) == ([], 0)


def test_t29_an_adapter_for_which_there_is_no_memory_is_not_taken_for_resident(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = make_net()
    bank, lora = make_bank(net), make_lora(1)

    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_zeros", full)
        with pytest.raises(torch.OutOfMemoryError):
            bank.hold({"x": lora})
    assert (bank.names, bank.pins) == ([], 0)
    bank.hold({"x": lora})
    x = torch.randn(1, 20, 6)
    with bank.rows([[LoraUse("x")]]):
        torch.testing.assert_close(net(x), merged(net, [(lora, LoraUse("x"))])(x))
