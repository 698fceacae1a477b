"""SD's ControlNets add to each row what diffusers' own pipelines add, whatever its neighbours use."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pipelines.images import to_tensor
from pipelines.sd.controlnet import ControlUse, pools, residuals
from tests.support import sd_controlnets
from tests.support.sd_controlnets import BASES, HEIGHT, KINDS, TOKENS, WIDTH, image

Uses = Sequence[Sequence[ControlUse]]
unet_of = cache(sd_controlnets.base)
net_of = cache(sd_controlnets.build)
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}  # of residuals up to 10, from batches of other sizes


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


def use(kind: str, scale: float = 1.0, seed: int = 4, **fields: Any) -> ControlUse:
    return ControlUse(net_of(kind), image(seed), scale, **fields)


def inputs_for(kind: str, rows: int, seed: int = 3) -> dict[str, Any]:
    return sd_controlnets.inputs(KINDS[kind][0], rows, seed)


def added(uses: Uses, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The residuals, the middle's last."""
    down, mid = residuals(uses, inputs)
    assert down is not None and mid is not None
    return [*down, mid]


def answer(name: str, inputs: Mapping[str, Any], down: Any = None, mid: Any = None) -> Tensor:
    """The base's prediction."""
    prediction: Tensor = unet_of(name)(
        **inputs,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]
    return prediction


def steered(kind: str, uses: Uses, inputs: Mapping[str, Any]) -> Tensor:
    return answer(KINDS[kind][0], inputs, *residuals(uses, inputs))


def row_of(inputs: Mapping[str, Any], row: int) -> dict[str, Any]:
    """One row's inputs."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(each) for name, each in value.items()}
        return None if value is None else value[row : row + 1]

    return {name: cut(value) for name, value in inputs.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_a_net_adds_what_diffusers_adds(kind: str, guess: bool, scale: float) -> None:
    uses = [use(kind, scale, guess=guess), use(kind, scale, seed=5, guess=guess)]
    inputs = inputs_for(kind, rows=2)
    theirs, their_mid = net_of(kind)(
        **inputs,
        controlnet_cond=torch.stack([each.image for each in uses]),
        conditioning_scale=scale,
        guess_mode=guess,
        return_dict=False,
    )

    ours, mid = residuals([[each] for each in uses], inputs)

    assert ours is not None and mid is not None
    for mine, other in zip([*ours, mid], [*theirs, their_mid], strict=True):
        if pools(net_of(kind)):
            torch.testing.assert_close(mine, other.expand_as(mine), **CLOSE)
        else:
            assert torch.equal(mine, other)
    name = KINDS[kind][0]
    expected = answer(name, inputs, theirs, their_mid)
    torch.testing.assert_close(answer(name, inputs, ours, mid), expected, **CLOSE)
    assert (expected - answer(name, inputs)).abs().max() > 0.01


def test_guessing_acts_from_a_tenth_to_all_with_depth() -> None:
    inputs = inputs_for("sd1", rows=1)
    plain, guessed = (added([[use("sd1", guess=guess)]], inputs) for guess in (False, True))
    factors = [(mine.norm() / whole.norm()).item() for mine, whole in zip(guessed, plain, strict=True)]
    assert factors[0] == pytest.approx(0.1) and factors[-1] == pytest.approx(1)
    steps = [later / earlier for earlier, later in zip(factors, factors[1:], strict=False)]
    assert steps == pytest.approx([10 ** (1 / (len(plain) - 1))] * len(steps), rel=1e-4)


@pytest.mark.parametrize("nets", [["sd1"], ["bgr"], ["shuffle"], ["sd2"], ["sdxl"], ["sdxl", "sdxl small"]])
@pytest.mark.parametrize("guess", [False, True])
def test_the_unet_answers_as_in_diffusers_own_pipelines(nets: list[str], guess: bool) -> None:
    name = KINDS[nets[0]][0]
    unet, scales = unet_of(name), [0.6, 0.9][: len(nets)]
    picture = Image.effect_mandelbrot((8 * WIDTH, 8 * HEIGHT), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    pixels = to_tensor(picture) / 2 + 0.5
    calls: list[dict[str, Any]] = []

    def watch(module: Any, args: Any, inputs: Any, output: Any) -> None:
        sample, timestep = args
        calls.append(inputs | {"sample": sample, "timestep": timestep.expand(len(sample)), "seen": output[0]})

    handle = unet.register_forward_hook(watch, with_kwargs=True)
    try:
        run_theirs(name, [net_of(kind) for kind in nets], scales, picture, guess)
    finally:
        handle.remove()

    controls = [
        ControlUse(net_of(kind), pixels, scale, guess=guess) for kind, scale in zip(nets, scales, strict=True)
    ]
    unconditional = [] if guess or any(pools(each.net) for each in controls) else controls
    for call in calls:
        inputs = {key: call[key] for key in inputs_for(nets[0], rows=2)}
        down, mid = residuals([unconditional, controls], inputs)
        assert down is not None and mid is not None
        theirs = [*call["down_block_additional_residuals"], call["mid_block_additional_residual"]]
        for mine, other in zip([*down, mid], theirs, strict=True):
            torch.testing.assert_close(mine, other.expand_as(mine), **CLOSE)
        torch.testing.assert_close(answer(name, inputs, down, mid), call["seen"], **CLOSE)
    assert len(calls) == 2


def run_theirs(name: str, nets: list[Any], scales: list[float], picture: Image.Image, guess: bool) -> None:
    """Two steps of diffusers' pipeline, with text guidance."""
    parts = {
        "vae": sd_controlnets.autoencoder(),
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet_of(name),
        "controlnet": nets if len(nets) > 1 else nets[0],
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear"),
    }
    generator = torch.Generator("cpu").manual_seed(0)
    texts = torch.randn(2, 1, TOKENS, BASES[name]["cross_attention_dim"], generator=generator)
    shared = {
        "prompt_embeds": texts[0],
        "negative_prompt_embeds": texts[1],
        "controlnet_conditioning_scale": scales if len(nets) > 1 else scales[0],
        "guidance_scale": 3.0,
        "guess_mode": guess,
        "generator": generator,
        "output_type": "latent",
    }
    pictures: Any = [picture] * len(nets) if len(nets) > 1 else picture
    if name == "sdxl":
        pipe = StableDiffusionXLControlNetImg2ImgPipeline(
            **parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
        )
        pooled = torch.randn(2, 1, 32, generator=generator)
        also: dict[str, Any] = {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
        also |= {"image": picture, "control_image": pictures, "strength": 0.5, "num_inference_steps": 4}
    else:
        pipe = StableDiffusionControlNetPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        also = {"image": pictures, "num_inference_steps": 2}
    pipe.set_progress_bar_config(disable=True)
    pipe(**shared, **also)


def test_nets_that_pool_are_told_apart() -> None:
    assert [kind for kind in KINDS if pools(net_of(kind))] == ["shuffle"]


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sdxl without attention"])
def test_a_net_that_pools_adds_its_means_everywhere(kind: str) -> None:
    inputs = inputs_for(kind, rows=1)
    pooling = ControlUse(sd_controlnets.build(kind, global_pool_conditions=True), image(), 0.7)
    for mine, whole in zip(added([[pooling]], inputs), added([[use(kind, 0.7)]], inputs), strict=True):
        torch.testing.assert_close(mine, whole.mean((2, 3), keepdim=True).expand_as(whole), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_controls_of_a_row_add_up(kind: str) -> None:
    inputs = inputs_for(kind, rows=2)
    one, other = use(kind), use(kind, 0.4, seed=5)
    both, *each = (added(uses, inputs) for uses in ([[one, other], []], [[one], []], [[other], []]))
    for mine, first, second in zip(both, *each, strict=True):
        torch.testing.assert_close(mine, first + second, **CLOSE)
        assert not mine[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_is_off(kind: str) -> None:
    inputs = inputs_for(kind, rows=2)
    assert residuals([[use(kind, 0)], []], inputs) == (None, None)
    first_alone = added([[use(kind)], []], inputs)
    with_zeros = added([[use(kind), use(kind, 0, seed=5)], [use(kind, 0)]], inputs)
    for mine, expected in zip(with_zeros, first_alone, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_black_mask_is_off_and_a_white_one_is_none(kind: str) -> None:
    inputs = inputs_for(kind, rows=1)
    black, white = (torch.full((1, 8 * HEIGHT, 8 * WIDTH), value) for value in (0.0, 1.0))

    off = steered(kind, [[use(kind, mask=black)]], inputs)
    everywhere = added([[use(kind, mask=white)]], inputs)

    assert torch.equal(off, answer(KINDS[kind][0], inputs))
    for masked, whole in zip(everywhere, added([[use(kind)]], inputs), strict=True):
        assert torch.equal(masked, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_says_where_a_net_acts_at_every_size(kind: str) -> None:
    inputs = inputs_for(kind, rows=1)
    left = (torch.arange(8 * WIDTH) < 4 * WIDTH).float().expand(1, 8 * HEIGHT, -1)
    masked, whole = (added([[use(kind, mask=mask)]], inputs) for mask in (left, None))
    for part, all_of_it in zip(masked, whole, strict=True):
        width = part.shape[3]
        assert torch.equal(part[..., : width // 2], all_of_it[..., : width // 2])
        assert not part[..., (width + 1) // 2 :].any()
    assert {part.shape[2:] for part in masked} >= {(HEIGHT, WIDTH), (HEIGHT // 2, WIDTH // 2)}


@pytest.mark.parametrize("kind", ["sdxl", "shuffle"])
def test_between_pixels_a_mask_is_linear(kind: str) -> None:
    inputs = inputs_for(kind, rows=1)
    ramp = ((torch.arange(8 * WIDTH) + 0.5) / (8 * WIDTH)).expand(1, 8 * HEIGHT, -1)
    masked, whole = (added([[use(kind, mask=mask)]], inputs) for mask in (ramp, None))
    for part, all_of_it in zip(masked, whole, strict=True):
        width = part.shape[3]
        torch.testing.assert_close(part, all_of_it * (torch.arange(width) + 0.5) / width, **CLOSE)


def test_a_gray_mask_is_a_scale() -> None:
    inputs = inputs_for("sdxl", rows=1)
    gray = added([[use("sdxl", mask=torch.full((1, 8 * HEIGHT, 8 * WIDTH), 0.25))]], inputs)
    for mine, expected in zip(gray, added([[use("sdxl", 0.25)]], inputs), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_proportional(kind: str) -> None:
    inputs = inputs_for(kind, rows=1)
    for twice, once in zip(added([[use(kind, 2)]], inputs), added([[use(kind)]], inputs), strict=True):
        assert torch.equal(twice, 2 * once)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_controls_stays_as_it_was(kind: str) -> None:
    inputs = inputs_for(kind, rows=3)
    prediction = steered(kind, [[], [use(kind)], []], inputs)
    alone = answer(KINDS[kind][0], inputs)
    assert torch.equal(prediction[[0, 2]], alone[[0, 2]])
    assert (prediction[1] - alone[1]).abs().max() > 0.01


def test_without_any_use_nothing_is_added() -> None:
    assert residuals([[], []], inputs_for("sd1", rows=2)) == (None, None)


def text(name: str, tokens: int, seed: int = 6) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tokens, BASES[name]["cross_attention_dim"], generator=generator)


@pytest.mark.parametrize("tokens", [TOKENS, 16])
def test_a_net_may_read_another_text_than_its_row(tokens: int) -> None:
    inputs, other = inputs_for("sdxl", rows=2), text("sdxl", tokens)
    mine = added([[use("sdxl", text=other)], [use("sdxl")]], inputs)
    told = row_of(inputs, 0) | {"encoder_hidden_states": other[None]}
    expected = [added([[use("sdxl")]], told), added([[use("sdxl")]], row_of(inputs, 1))]
    untold = added([[use("sdxl")]], row_of(inputs, 0))
    for both, *separate in zip(mine, *expected, strict=True):
        torch.testing.assert_close(both, torch.cat(separate), **CLOSE)
    assert any((both[:1] - plain).abs().max() > 0.01 for both, plain in zip(mine, untold, strict=True))


MASKS = st.integers(0, 3).map(
    lambda seed: torch.rand(1, 8 * HEIGHT, 8 * WIDTH, generator=torch.Generator("cpu").manual_seed(seed))
)


def uses_on(name: str) -> st.SearchStrategy[Uses]:
    """Rows of controls on one base."""
    one = st.builds(
        use,
        kind=st.sampled_from([kind for kind, (base, _) in KINDS.items() if base == name]),
        scale=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        seed=st.integers(0, 2),
        mask=st.none() | MASKS,
        guess=st.booleans(),
        text=st.none() | st.sampled_from([TOKENS, 7]).map(lambda tokens: text(name, tokens)),
    )
    return st.lists(st.lists(one, max_size=3), min_size=1, max_size=4)


@settings(max_examples=50)
@given(data=st.data(), name=st.sampled_from(list(BASES)))
def test_a_batch_is_its_rows_and_a_row_is_its_controls_in_any_order(data: st.DataObject, name: str) -> None:
    uses = data.draw(uses_on(name))
    inputs = sd_controlnets.inputs(name, len(uses))
    if not any(control.scale for row in uses for control in row):
        assert residuals(uses, inputs) == (None, None)
        return
    together = added(uses, inputs)

    for mine, reverse in zip(together, added([list(row)[::-1] for row in uses], inputs), strict=True):
        torch.testing.assert_close(mine, reverse, **CLOSE)
    for row, controls in enumerate(uses):
        expected = [torch.zeros_like(each[:1]) for each in together]
        for control in controls:
            if control.scale:
                alone = added([[control]], row_of(inputs, row))
                expected = [a + b for a, b in zip(expected, alone, strict=True)]
        for mine, separate in zip(together, expected, strict=True):
            torch.testing.assert_close(mine[row : row + 1], separate, **CLOSE)


def test_each_net_runs_once_for_texts_of_one_length() -> None:
    inputs = inputs_for("sdxl", rows=3)
    same, longer = text("sdxl", TOKENS), text("sdxl", 16)
    uses = [
        [use("sdxl"), use("sdxl", text=same)],
        [use("sdxl small"), use("sdxl", text=longer), use("sdxl mid", 0)],
        [use("sdxl small", 0.5), use("sdxl", text=longer, seed=5)],
    ]
    runs: list[Any] = []
    handles = [net.register_forward_hook(lambda net, *_: runs.append(net)) for net in map(net_of, KINDS)]
    residuals(uses, inputs)
    for handle in handles:
        handle.remove()
    assert runs == [net_of("sdxl"), net_of("sdxl small"), net_of("sdxl")]


@pytest.mark.parametrize("channels", [8, 9, 12])
def test_of_a_wider_sample_a_net_reads_the_latents(channels: int) -> None:
    inputs = inputs_for("sd1", rows=2)
    more = torch.randn(2, channels - 4, HEIGHT, WIDTH, generator=torch.Generator("cpu").manual_seed(7))
    wider = inputs | {"sample": torch.cat([inputs["sample"], more], 1)}
    uses = [[use("sd1")], [use("sd1", 0.5)]]
    for mine, expected in zip(added(uses, wider), added(uses, inputs), strict=True):
        assert torch.equal(mine, expected)


def test_image_embeddings_beside_the_pooled_text_are_the_unets_alone() -> None:
    inputs = inputs_for("sdxl", rows=2)
    more = inputs | {"added_cond_kwargs": inputs["added_cond_kwargs"] | {"image_embeds": [torch.ones(1)]}}
    uses = [[use("sdxl")], [use("sdxl")]]
    for mine, expected in zip(added(uses, more), added(uses, inputs), strict=True):
        assert torch.equal(mine, expected)


def test_half_precision_scales_as_diffusers_does_beside_any_neighbour() -> None:
    net = sd_controlnets.build("sd2").bfloat16()
    inputs = {
        name: value if value is None or name == "timestep" else value.bfloat16()
        for name, value in inputs_for("sd2", rows=1).items()
    }
    one = ControlUse(net, image(), 0.7)
    masked = ControlUse(net, image(5), 0.3, torch.ones(1, 8 * HEIGHT, 8 * WIDTH), guess=True)
    theirs, their_mid = net(
        **inputs,
        controlnet_cond=one.image[None].bfloat16(),
        conditioning_scale=0.7,
        return_dict=False,
    )

    ours = added([[one]], inputs)
    two = {name: None if each is None else each.repeat_interleave(2, 0) for name, each in inputs.items()}
    beside = added([[one], [masked]], two)

    for mine, expected, neighboured in zip(ours, [*theirs, their_mid], beside, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, expected)
        assert torch.equal(neighboured[:1], expected)


def test_a_control_image_has_the_rows_size() -> None:
    wrong = ControlUse(net_of("sd1"), image()[..., :-8], 1)
    with pytest.raises(AssertionError, match=r"a control image is \(3, 48, 80\), not"):
        residuals([[wrong]], inputs_for("sd1", rows=1))


def test_the_full_size_goes_through_in_its_shapes() -> None:
    half: Any = {"dtype": torch.bfloat16, "device": "meta"}
    nets = [sd_controlnets.full_size(name).bfloat16() for name in ("SDXL", "SDXL small")]
    inputs = {
        "sample": torch.empty(2, 4, 128, 96, **half),
        "timestep": torch.empty(2, device="meta"),
        "encoder_hidden_states": torch.empty(2, 77, 2048, **half),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(2, 1280, **half),
            "time_ids": torch.empty(2, 6, **half),
        },
    }
    picture = torch.empty(3, 1024, 768, **half)
    full, small = (ControlUse(net, picture, 0.5, torch.empty(1, 1024, 768, **half)) for net in nets)
    down, mid = residuals([[full, small], [small]], inputs)
    assert down is not None and mid is not None
    assert [tuple(each.shape[1:]) for each in [*down, mid]] == [
        *[(320, 128, 96)] * 3,
        (320, 64, 48),
        *[(640, 64, 48)] * 2,
        (640, 32, 24),
        *[(1280, 32, 24)] * 3,
    ]
    assert {len(each) for each in [*down, mid]} == {2}
