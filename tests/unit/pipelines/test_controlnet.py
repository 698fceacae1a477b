"""ControlNets add to each row what diffusers' own pipeline adds, whatever its neighbours use."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pipelines.flux.controlnet import MODES, ControlUse, modes, reads_pixels, residuals
from pipelines.images import to_tensor
from tests.support import controlnets
from tests.support.controlnets import BLOCKS, KINDS, SINGLE_BLOCKS, TOKENS

Uses = Sequence[Sequence[ControlUse]]
base = cache(controlnets.base)
net_of = cache(controlnets.build)
POSE = MODES["pose"]


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


def use(kind: str, scale: float = 1.0, mask: Tensor | None = None, seed: int = 4) -> ControlUse:
    net = net_of(kind)
    return ControlUse(net, controlnets.image(net, seed), scale, mask, POSE if modes(net) else None)


def added(uses: Uses, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The residuals as [blocks, rows, tokens, width], zeros where there are none."""
    rows = len(uses)
    lists = zip(residuals(uses, inputs, BLOCKS, SINGLE_BLOCKS), (BLOCKS, SINGLE_BLOCKS), strict=True)
    double, single = (
        torch.zeros(count, rows, TOKENS, 32) if each is None else torch.stack(each) for each, count in lists
    )
    return double, single


def answer(inputs: Mapping[str, Any], samples: Any, single_samples: Any, repeated: bool = False) -> Tensor:
    """The base's velocity."""
    velocity: Tensor = base()(
        **inputs,
        controlnet_block_samples=samples,
        controlnet_single_block_samples=single_samples,
        controlnet_blocks_repeat=repeated,
        return_dict=False,
    )[0]
    return velocity


def steered(uses: Uses, inputs: Mapping[str, Any]) -> Tensor:
    return answer(inputs, *residuals(uses, inputs, BLOCKS, SINGLE_BLOCKS))


def row_of(inputs: Mapping[str, Any], row: int) -> dict[str, Any]:
    """One row's inputs."""
    shared = ("txt_ids", "img_ids")
    return {name: each if name in shared else each[row : row + 1] for name, each in inputs.items()}


def distinct(samples: Sequence[Tensor] | None) -> list[Tensor]:
    return list({id(each): each for each in samples or ()}.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_a_net_adds_to_each_block_what_diffusers_adds(kind: str, scale: float) -> None:
    net, one = net_of(kind), use(kind, scale)
    inputs = controlnets.inputs(rows=1)
    theirs, single_theirs = net(
        **(inputs if net.config.guidance_embeds else inputs | {"guidance": None}),
        controlnet_cond=one.image[None],
        controlnet_mode=torch.tensor([[POSE]]),
        conditioning_scale=scale,
        return_dict=False,
    )

    ours, single_ours = residuals([[one]], inputs, BLOCKS, SINGLE_BLOCKS)

    assert [ours and len(ours), single_ours and len(single_ours)] == [
        theirs and BLOCKS,
        single_theirs and SINGLE_BLOCKS,
    ]
    for mine, other in ((ours, theirs), (single_ours, single_theirs)):
        for each, expected in zip(distinct(mine), other or (), strict=True):
            assert torch.equal(each, expected)
    repeated = net.input_hint_block is not None  # as FluxControlNetPipeline has it
    expected = answer(inputs, theirs, single_theirs, repeated)
    torch.testing.assert_close(answer(inputs, ours, single_ours), expected, atol=1e-6, rtol=1e-5)
    assert (expected - answer(inputs, None, None)).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["InstantX", "union", "union 2.0", "XLabs", "pixels and single blocks"])
def test_the_transformer_answers_as_in_diffusers_own_pipeline(kind: str, stock: Any) -> None:
    net = net_of(kind)
    parts = {name: part for name, part in stock.components.items() if "image" not in name}
    pipe = FluxControlNetPipeline(**(parts | {"transformer": base(), "controlnet": net}))
    pipe.set_progress_bar_config(disable=True)
    picture = Image.effect_mandelbrot((64, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    calls: dict[Any, list[tuple[Any, Any]]] = {net: [], base(): []}

    def watch(module: Any, args: Any, inputs: Any, output: Any) -> None:
        calls[module].append((inputs, output))

    handles = [module.register_forward_hook(watch, with_kwargs=True) for module in calls]
    pipe(
        "a fox",
        control_image=picture,
        control_mode=POSE,
        controlnet_conditioning_scale=0.6,
        height=32,
        width=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=32,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="latent",
    )
    for handle in handles:
        handle.remove()

    by_us = ("controlnet_block_samples", "controlnet_single_block_samples", "controlnet_blocks_repeat")
    for (to_net, _), (to_base, velocity) in zip(calls[net], calls[base()], strict=True):
        one = ControlUse(net, to_net["controlnet_cond"][0], 0.6, mode=POSE)
        if reads_pixels(net):
            torch.testing.assert_close(one.image, to_tensor(picture), atol=1e-6, rtol=0)
        inputs = {name: value for name, value in to_base.items() if name not in by_us}
        inputs["guidance"] = torch.full_like(inputs["guidance"], 3.0)
        inputs.pop("joint_attention_kwargs")
        inputs.pop("return_dict")
        torch.testing.assert_close(steered([[one]], inputs), velocity[0], atol=1e-5, rtol=1e-5)
    assert len(calls[base()]) == 2


def test_nets_are_told_apart() -> None:
    assert [kind for kind in KINDS if reads_pixels(net_of(kind))] == ["XLabs", "pixels and single blocks"]
    assert {kind: modes(net_of(kind)) for kind in KINDS if modes(net_of(kind))} == {"union": 10}


@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_is_off(kind: str) -> None:
    inputs = controlnets.inputs(rows=2)
    assert residuals([[use(kind, 0)], []], inputs, BLOCKS, SINGLE_BLOCKS) == (None, None)
    with_others = [[use(kind, 0), use("union 2.0")], [use(kind, 0)]]
    assert torch.equal(steered(with_others, inputs), steered([[use("union 2.0")], []], inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_says_where_a_net_acts(kind: str) -> None:
    inputs = controlnets.inputs(rows=1)
    plain = added([[use(kind)]], inputs)
    left = torch.tensor([[1.0], [1.0], [0.0], [1.0], [1.0], [0.0]])

    off = steered([[use(kind, mask=torch.zeros(TOKENS, 1))]], inputs)
    everywhere = added([[use(kind, mask=torch.ones(TOKENS, 1))]], inputs)
    partly = added([[use(kind, mask=left)]], inputs)

    assert torch.equal(off, answer(inputs, None, None))
    for masked, whole, part in zip(everywhere, plain, partly, strict=True):
        assert torch.equal(masked, whole)
        assert torch.equal(part, whole * left)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_proportional(kind: str) -> None:
    inputs = controlnets.inputs(rows=1)
    for twice, once in zip(added([[use(kind, 2)]], inputs), added([[use(kind)]], inputs), strict=True):
        assert torch.equal(twice, 2 * once)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_controls_stays_as_it_was(kind: str) -> None:
    inputs = controlnets.inputs(rows=3)
    velocity = steered([[], [use(kind)], []], inputs)
    alone = answer(inputs, None, None)
    assert torch.equal(velocity[[0, 2]], alone[[0, 2]])
    assert (velocity[1] - alone[1]).abs().max() > 0.01


def test_without_any_use_nothing_is_added() -> None:
    assert residuals([[], []], controlnets.inputs(rows=2), BLOCKS, SINGLE_BLOCKS) == (None, None)


MASKS = st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS).map(
    lambda marks: torch.tensor(marks).float()[:, None]
)
USES = st.builds(
    use,
    kind=st.sampled_from(list(KINDS)),
    scale=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    mask=st.none() | MASKS,
    seed=st.integers(0, 2),
)


@settings(max_examples=40)
@given(st.lists(st.lists(USES, max_size=3), min_size=1, max_size=4))
def test_a_batch_is_its_rows_and_a_row_is_its_controls_in_any_order(uses: list[list[ControlUse]]) -> None:
    inputs = controlnets.inputs(len(uses))
    together = added(uses, inputs)
    in_reverse = added([list(reversed(row)) for row in uses], inputs)

    for mine, reverse in zip(together, in_reverse, strict=True):
        torch.testing.assert_close(mine, reverse, atol=1e-5, rtol=1e-5)
    for row, controls in enumerate(uses):
        alone = row_of(inputs, row)
        expected = [torch.zeros_like(each[:, row : row + 1]) for each in together]
        for control in controls:
            expected = [a + b for a, b in zip(expected, added([[control]], alone), strict=True)]
        for mine, separate in zip(together, expected, strict=True):
            torch.testing.assert_close(mine[:, row : row + 1], separate, atol=1e-5, rtol=1e-5)


def test_each_net_runs_once_and_equal_blocks_share_memory() -> None:
    inputs = controlnets.inputs(rows=3)
    uses = [[use("union"), use("union", seed=5)], [use("XLabs")], [use("union", 0.5), use("XLabs")]]
    runs: list[Any] = []
    handles = [net.register_forward_hook(lambda net, *_: runs.append(net)) for net in map(net_of, KINDS)]
    double, single = residuals(uses, inputs, BLOCKS, SINGLE_BLOCKS)
    for handle in handles:
        handle.remove()

    assert runs == [net_of("union"), net_of("XLabs")]
    assert double is not None and single is not None
    # union: 0 0 0 1 1 over the blocks; XLabs: 0 1 0 1 0
    assert double[0] is double[2] and len(distinct(double)) == 4
    assert len(distinct(single)) == 3


def test_a_net_with_guidance_beside_a_base_without_gets_one() -> None:
    inputs = controlnets.inputs(rows=2)
    uses = [[use("InstantX")], [use("union", 0.5)]]
    ones = added(uses, inputs | {"guidance": torch.ones(2)})
    for mine, expected in zip(added(uses, inputs | {"guidance": None}), ones, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("mode", [None, -1, 10])
def test_a_union_net_is_told_a_mode_that_it_has(mode: int | None) -> None:
    net = net_of("union")
    one = ControlUse(net, controlnets.image(net), 1, mode=mode)
    with pytest.raises(AssertionError, match="10 modes"):
        residuals([[one]], controlnets.inputs(rows=1), BLOCKS, SINGLE_BLOCKS)


def test_modes_differ_and_other_nets_ignore_them() -> None:
    inputs = controlnets.inputs(rows=1)

    def under(kind: str, mode: int) -> Tensor:
        net = net_of(kind)
        return added([[ControlUse(net, controlnets.image(net), 1, mode=mode)]], inputs)[0]

    assert (under("union", 0) - under("union", 4)).abs().max() > 0.01
    assert torch.equal(under("union 2.0", 0), under("union 2.0", 4))


def test_half_precision_scales_as_diffusers_does_beside_any_neighbour() -> None:
    net = controlnets.build("InstantX").bfloat16()
    one = ControlUse(net, controlnets.image(net), 0.7)
    masked = ControlUse(net, controlnets.image(net, 5), 0.3, torch.ones(TOKENS, 1))
    inputs = {name: each.bfloat16() for name, each in controlnets.inputs(rows=1).items()}
    theirs, _ = net(
        **inputs, controlnet_cond=one.image[None].bfloat16(), conditioning_scale=0.7, return_dict=False
    )

    ours, _ = residuals([[one]], inputs, BLOCKS, SINGLE_BLOCKS)
    two = {name: each if "ids" in name else each.repeat_interleave(2, 0) for name, each in inputs.items()}
    beside, _ = residuals([[one], [masked]], two, BLOCKS, SINGLE_BLOCKS)

    assert ours is not None and beside is not None
    for mine, expected, neighboured in zip(distinct(ours), theirs, distinct(beside), strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, expected)
        assert torch.equal(neighboured[:1], expected)


def test_the_full_size_goes_through_in_its_shapes() -> None:
    with torch.device("meta"):
        pro = controlnets.empty(num_layers=5, num_single_layers=10, num_mode=10, guidance_embeds=True)
        xlabs = controlnets.empty(
            num_layers=2, num_single_layers=0, guidance_embeds=True, **controlnets.PIXELS
        )
        inputs = {
            "hidden_states": torch.empty(2, 4096, 64),
            "encoder_hidden_states": torch.empty(2, 512, 4096),
            "pooled_projections": torch.empty(2, 768),
            "timestep": torch.empty(2),
            "guidance": torch.empty(2),
            "txt_ids": torch.empty(512, 3),
            "img_ids": torch.empty(4096, 3),
        }
        latents = ControlUse(pro, torch.empty(4096, 64), 0.5, torch.empty(4096, 1), mode=0)
        pixels = ControlUse(xlabs, torch.empty(3, 1024, 1024), 0.5)
    double, single = residuals([[latents, pixels], [pixels]], inputs, 19, 38)
    assert double is not None and single is not None
    assert {tuple(each.shape) for each in double + single} == {(2, 4096, 3072)}
    assert [len(double), len(single)] == [19, 38]
