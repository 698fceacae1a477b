"""The stage of a LoRA bank: what compiled forwards read does what the bank's own buffers do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.adapters.bank import LoraBank, LoraUse, stage_widths
from pipelines.adapters.uploading import in_blocks
from tests.unit.pipelines.test_bank import TARGETS, inputs, make_lora, make_net

RANKS = {"0": 3, "1": 9, "2": 20, "3": 1}


def make(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, LoraBank]:
    net = make_net().to(dtype)
    bank = LoraBank({name: getattr(net, name) for name in TARGETS}, 64, staged_rows=3)
    bank.hold({name: make_lora(int(name), rank=rank) for name, rank in RANKS.items()})
    return net, bank


use = st.builds(LoraUse, st.sampled_from("0123"), st.floats(-2, 2, width=32))
batches = st.lists(st.lists(st.lists(use, max_size=2), min_size=3, max_size=3), min_size=1, max_size=4)


@settings(max_examples=40)
@given(batches)
def test_staged_forwards_are_those_of_the_bank_batch_after_batch(
    batches: list[list[list[LoraUse]]],
) -> None:
    (net, bank), x = make(torch.float64), inputs().double()
    for uses in batches:  # the stage keeps what the batch before left there
        assert bank.can_stage(uses)
        with torch.inference_mode(), bank.rows(uses):
            expected = net(x)
        with torch.inference_mode(), bank.rows(uses, staged=True):
            torch.testing.assert_close(net(x), expected)


def test_the_stage_is_as_wide_as_its_adapters_need() -> None:
    assert stage_widths(128) == (16, 64, 128)
    assert stage_widths(16) == (16,)
    _, bank = make()

    def width(*names: str) -> int:
        with torch.inference_mode(), bank.rows([[LoraUse(name) for name in names], [], []], staged=True):
            return 0 if bank.staged is None else bank.staged.shape[1]

    assert [width(), width("0"), width("2"), width("1", "2", "3"), width("1")] == [0, 16, 64, 64, 16]


def test_its_places_stay_the_same_whatever_is_on_it() -> None:
    _, bank = make()
    places = set()
    for name in "0123":
        with torch.inference_mode(), bank.rows([[LoraUse(name)], [], []], staged=True):
            assert bank.staged is not None
            places.add((bank.staged.data_ptr(), bank._layers["a"].staged_down.data_ptr()))
    assert len(places) == 1


def test_what_it_does_not_know_is_left_to_the_bank() -> None:
    net, bank = make()
    bank.hold({"biased": make_lora(7, biased=["a"])})
    assert not bank.can_stage([[LoraUse("0", 1.0, {"a": 0.5})]])
    assert not bank.can_stage([[LoraUse("biased")]])
    assert not bank.can_stage([[LoraUse("0")]] * 4)  # more rows than it has
    assert not LoraBank({"a": make_net().a}, 8).can_stage([[LoraUse("0")]])


def test_an_adapter_that_another_took_the_place_of_is_staged_anew() -> None:
    net, bank = make()
    bank.release(RANKS)
    with torch.inference_mode(), bank.rows([[LoraUse("0")], [], []], staged=True):
        pass
    bank.hold({"large": make_lora(9, rank=60)})
    x = inputs()
    with torch.inference_mode(), bank.rows([[LoraUse("large")], [], []]):
        expected = net(x)
    with torch.inference_mode(), bank.rows([[LoraUse("large")], [], []], staged=True):
        torch.testing.assert_close(net(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pinned", [False, True])
def test_layers_come_in_one_copy_for_each_block_of_memory(pinned: bool) -> None:
    lora = make_lora(1, biased=["a"])
    if pinned:
        lora = lora.pinned(pin=torch.Tensor.clone)
    copies: list[torch.Tensor] = []

    def moved(block: torch.Tensor) -> torch.Tensor:
        copies.append(block.clone())
        return copies[-1]

    there = in_blocks(lora.layers, moved)
    assert len(copies) == (1 if pinned else 9)
    for name, layer in lora.layers.items():
        for ours, theirs in zip(
            (there[name].down, there[name].up, there[name].bias),
            (layer.down, layer.up, layer.bias),
            strict=True,
        ):
            assert (ours is None and theirs is None) or (
                ours is not None and theirs is not None and torch.equal(ours, theirs)
            )
