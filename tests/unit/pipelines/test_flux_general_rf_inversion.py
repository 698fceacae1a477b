"""flux-general/rf-inversion: the inversion, the way back, and company in a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.base import Assets, Generation
from pipelines.engine.engine import Engine
from pipelines.engine.sample import Sample
from pipelines.flux import flux_dev, flux_lora_image_to_image
from pipelines.flux.flux_general_rf_inversion import SOURCE_GUIDANCE, Pipeline
from pipelines.flux.model import FluxModel
from pipelines.flux.sampling import Grid, draw_noise
from schemas.endpoints import flux_dev as flux_dev_schema
from schemas.endpoints import flux_lora_image_to_image as flux_lora_schema
from schemas.endpoints.flux_general_rf_inversion import Input
from tests.support.assets import given
from tests.support.engine import Ears, turn
from tests.support.fields import shows
from tests.support.rf_inversion import GRID, RF, STEPS, URL, finished, prepare, request

Denoise = Callable[..., list[Sample]]


@pytest.fixture
def origin(flux: FluxModel, start: Image.Image) -> Tensor:
    return flux.encode_image(start, GRID)


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def noise_after_inversion(edit: Pipeline, start: Image.Image, wish: Input) -> Tensor:
    [sample] = prepare(edit, start, wish).samples
    engine = Engine(edit.model.predict, 1 << 20)
    engine.add(sample, Ears())
    for _ in range(wish.num_inference_steps):
        turn(engine)
    return sample.latents


@shows(RF, "image_url")
@pytest.mark.parametrize("gamma", [0.1, 1.0, 2.5])
@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m"])
def test_eta_one_to_the_end_gives_the_picture_back(
    run: Callable[..., Tensor], origin: Tensor, gamma: float, scheduler: str
) -> None:
    back = run(
        controller_guidance_forward=gamma,
        controller_guidance_reverse=1.0,
        reverse_guidance_end=STEPS,
        scheduler=scheduler,
    )
    close(back[0], origin)


@shows(RF, "controller_guidance_forward")
def test_gamma_one_inverts_to_exactly_the_seeds_noise(edit: Pipeline, start: Image.Image) -> None:
    noise = noise_after_inversion(edit, start, request(controller_guidance_forward=1.0))
    close(noise, draw_noise(GRID, 7))


@shows(RF, "controller_guidance_forward")
def test_gamma_zero_inverts_without_the_seed(edit: Pipeline, start: Image.Image) -> None:
    one, other = (
        noise_after_inversion(edit, start, request(controller_guidance_forward=0.0, seed=seed))
        for seed in (1, 2)
    )
    assert torch.equal(one, other)


def test_the_nearer_gamma_to_one_the_nearer_the_noise_to_the_seeds(
    edit: Pipeline, start: Image.Image
) -> None:
    distances = [
        (
            noise_after_inversion(edit, start, request(controller_guidance_forward=gamma))
            - draw_noise(GRID, 7)
        ).norm()
        for gamma in (0.2, 0.5, 0.8, 1.0)
    ]
    assert distances == sorted(distances, reverse=True)


@shows(RF, "seed", "prompt", "guidance_scale")
def test_gamma_one_without_eta_is_text_to_image_on_the_seeds_noise(
    flux: FluxModel, run: Callable[..., Tensor], denoise: Denoise
) -> None:
    plain = flux_dev_schema.Input(
        prompt="a red square",
        image_size={"width": GRID.width, "height": GRID.height},
        num_inference_steps=STEPS,
        guidance_scale=2.0,
        seed=7,
    )
    text_to_image = flux_dev.Pipeline(flux).prepare(plain, Assets(), 0)
    edited = run(controller_guidance_forward=1.0, controller_guidance_reverse=0.0, guidance_scale=2.0)
    close(edited, finished(denoise, text_to_image))


def test_without_control_the_way_back_errs_less_the_more_steps(
    run: Callable[..., Tensor], origin: Tensor
) -> None:
    errors = [
        (
            run(
                prompt="",
                guidance_scale=SOURCE_GUIDANCE,
                controller_guidance_forward=0.0,
                controller_guidance_reverse=0.0,
                num_inference_steps=steps,
            )[0]
            - origin
        ).norm()
        for steps in (3, 12, 48)
    ]
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


@shows(RF, "controller_guidance_reverse")
def test_more_eta_ends_nearer_to_the_picture(run: Callable[..., Tensor], origin: Tensor) -> None:
    distances = [
        (run(controller_guidance_reverse=eta, reverse_guidance_end=STEPS)[0] - origin).norm()
        for eta in (0.01, 0.3, 0.6, 0.9)
    ]
    assert distances == sorted(distances, reverse=True)


@shows(RF, "reverse_guidance_end")
def test_a_later_end_of_eta_ends_nearer_to_the_picture(run: Callable[..., Tensor], origin: Tensor) -> None:
    distances = [(run(reverse_guidance_end=end)[0] - origin).norm() for end in (1, 2, 3, 4)]
    assert distances == sorted(distances, reverse=True)
    assert torch.equal(run(reverse_guidance_end=STEPS), run(reverse_guidance_end=50))


@shows(RF, "reverse_guidance_start")
def test_a_later_start_of_eta_ends_farther_from_the_picture(
    run: Callable[..., Tensor], origin: Tensor
) -> None:
    """The last steps decide: with eta 1 in only one of them that one goes straight to the picture."""
    close(run(controller_guidance_reverse=1.0, reverse_guidance_start=STEPS - 1)[0], origin)
    with_first, without_first = (
        (run(reverse_guidance_start=start, reverse_guidance_end=2)[0] - origin).norm() for start in (0, 1)
    )
    assert with_first < without_first


@shows(RF, "reverse_guidance_schedule")
def test_falling_eta_spares_the_end_and_rising_eta_the_beginning(
    edit: Pipeline, start: Image.Image, denoise: Denoise, run: Callable[..., Tensor], origin: Tensor
) -> None:
    whole = {"controller_guidance_reverse": 1.0, "reverse_guidance_end": STEPS}
    rising = run(reverse_guidance_schedule="linear_increase", **whole)
    falling = run(reverse_guidance_schedule="linear_decrease", **whole)
    close(rising[0], origin)  # the last step has all of eta 1
    assert (falling[0] - origin).norm() > 0.1 * origin.norm()
    first_only = run(reverse_guidance_end=1, reverse_guidance_schedule="linear_decrease")
    assert torch.equal(first_only, run(reverse_guidance_end=1))  # one step gets all of eta


@shows(RF, "use_cfg_zero")
@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m"])
def test_with_cfg_zero_the_first_step_back_stands_still(
    edit: Pipeline, start: Image.Image, scheduler: str
) -> None:
    wish = request(use_cfg_zero=True, controller_guidance_reverse=0.0, scheduler=scheduler)
    [sample] = prepare(edit, start, wish).samples
    engine = Engine(edit.model.predict, 1 << 20)
    engine.add(sample, Ears())
    for _ in range(STEPS):
        turn(engine)
    noise = sample.latents
    turn(engine)
    close(sample.latents, noise, atol=1e-6)
    turn(engine)
    assert (sample.latents - noise).norm() > 0.01 * noise.norm()


@shows(RF, "num_inference_steps")
def test_inversion_and_denoising_each_have_the_steps_asked_for(edit: Pipeline, start: Image.Image) -> None:
    [sample] = prepare(edit, start, request(num_inference_steps=5)).samples
    assert sample.plan.steps == 10


@shows(RF, "scheduler")
def test_the_second_order_is_nearer_to_where_many_steps_end(
    edit: Pipeline, start: Image.Image, denoise: Denoise, flux: FluxModel
) -> None:
    """With gamma 1 both begin at the same noise, whatever the steps."""

    def end(steps: int, scheduler: str) -> Tensor:
        wish = request(
            num_inference_steps=steps,
            scheduler=scheduler,
            controller_guidance_forward=1.0,
            controller_guidance_reverse=0.0,
        )
        return finished(denoise, prepare(edit, start, wish))

    exact = end(50, "dpmpp_2m")
    assert (end(8, "dpmpp_2m") - exact).norm() < (end(8, "euler") - exact).norm() / 1.5
    close(end(1, "dpmpp_2m"), end(1, "euler"))


@shows(RF, "base_shift", "max_shift", "use_beta_schedule", "sigma_schedule")
@pytest.mark.parametrize(
    ("fields", "tokens_of_equal_shift"),
    [
        ({"base_shift": 2.0}, 4096),
        ({"max_shift": 3.0}, 256),
    ],
)
def test_a_shift_counts_at_its_size(
    flux: FluxModel, fields: dict[str, float], tokens_of_equal_shift: int
) -> None:
    usual = {"base_shift": 0.5, "max_shift": 1.15, "spacing": "even"}
    same = Grid(tokens_of_equal_shift // 16, 16)
    small = Grid(16, 48)

    def sigmas(grid: Grid, values: dict[str, Any]) -> tuple[float, ...]:
        return flux.shifted_sigmas(8, grid, **values)

    assert sigmas(same, usual) == sigmas(same, usual | fields)
    assert all(
        more > less
        for more, less in zip(sigmas(small, usual | fields)[1:-1], sigmas(small, usual)[1:-1], strict=True)
    )


@shows(RF, "base_shift", "max_shift", "use_beta_schedule", "sigma_schedule")
@pytest.mark.parametrize(
    ("fields", "spacing"),
    [
        ({}, "even"),
        ({"use_beta_schedule": True}, "beta"),
        ({"sigma_schedule": "sgm_uniform"}, "sgm_uniform"),
        ({"use_beta_schedule": True, "sigma_schedule": "sgm_uniform"}, "beta"),
        ({"base_shift": 2.0}, "even"),
        ({"max_shift": 3.0}, "even"),
    ],
)
def test_both_ways_go_along_the_sigmas_asked_for(
    edit: Pipeline, start: Image.Image, fields: dict[str, Any], spacing: Any
) -> None:
    wish = request(**fields)
    [sample] = prepare(edit, start, wish).samples
    sigmas = edit.model.shifted_sigmas(STEPS, GRID, wish.base_shift, wish.max_shift, spacing)
    seen = [sample.plan.row(step).sigma for step in range(2 * STEPS)]  # type: ignore[attr-defined]
    assert seen == [*reversed(sigmas[1:]), *sigmas[:-1]]


@shows(RF, "num_images", "seed")
def test_image_i_of_n_is_the_single_image_of_seed_plus_i(run: Callable[..., Tensor]) -> None:
    three = run(num_images=3)
    close(three, torch.cat([run(seed=7 + i) for i in range(3)]))
    assert not torch.allclose(three[0], three[1], atol=1e-3)


@shows(RF, "image_size.width", "image_size.height")
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (96, 64)),  # that of the picture
        ({"image_size": {"width": 64, "height": 80}}, (64, 80)),
        ({"image_size": "square"}, (512, 512)),
    ],
)
def test_the_size_is_the_one_asked_for_or_the_pictures(
    edit: Pipeline, start: Image.Image, denoise: Denoise, fields: dict[str, Any], size: tuple[int, int]
) -> None:
    generation = prepare(edit, start, request(num_inference_steps=1, **fields))
    [sample] = denoise(list(generation.samples))
    assert edit.finish(sample).size == size


def test_a_known_inversion_is_not_done_again(edit: Pipeline, start: Image.Image, denoise: Denoise) -> None:
    first = finished(denoise, prepare(edit, start, request()))
    again = prepare(edit, start, request(prompt="a red square"))
    assert again.samples[0].plan.steps == STEPS
    assert torch.equal(finished(denoise, again), first)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"controller_guidance_forward": 0.7},
        {"num_inference_steps": 5},
        {"base_shift": 0.6},
        {"image_size": {"width": 96, "height": 48}},
        {"use_beta_schedule": True},
        {"loras": [{"path": "a"}]},
    ],
)
def test_another_inversion_is_done(
    edit: Pipeline, start: Image.Image, denoise: Denoise, lora_files: dict[str, Path], change: dict[str, Any]
) -> None:
    finished(denoise, prepare(edit, start, request()))
    wish = request(**change)
    with (other := prepare(edit, start, wish, lora_files)).resources:
        assert other.samples[0].plan.steps == 2 * wish.num_inference_steps


def test_another_picture_is_inverted_again(edit: Pipeline, start: Image.Image, denoise: Denoise) -> None:
    finished(denoise, prepare(edit, start, request()))
    other = prepare(edit, start.transpose(Image.Transpose.ROTATE_180), request())
    assert other.samples[0].plan.steps == 2 * STEPS


@shows(RF, "loras.path", "loras.scale")
def test_loras_act_on_both_ways(
    edit: Pipeline, start: Image.Image, run: Callable[..., Tensor], lora_files: dict[str, Path]
) -> None:
    wish = request(loras=[{"path": "a"}])
    [plain] = prepare(edit, start, request()).samples
    with (generation := prepare(edit, start, wish, lora_files)).resources:
        [sample] = generation.samples
        rows = [sample.plan.row(step).adapters.loras for step in range(2 * STEPS)]  # type: ignore[attr-defined]
        assert all(len(loras) == 1 for loras in rows)
        with torch.inference_mode():
            one, other = edit.model.predict([plain, sample])
        assert not torch.allclose(one, other, atol=1e-3)


@shows(RF, "loras.scale")
def test_the_scale_of_a_lora_may_be_one_number_or_one_for_each_layer(
    run: Callable[..., Tensor], lora_files: dict[str, Path]
) -> None:
    plain = run()
    all_named = {"transformer_blocks": 0.5, "single_blocks": 0.5, "text_encoder": 0.5}

    def scaled(scale: Any) -> Tensor:
        return run(lora_files, loras=[{"path": "a", "scale": scale}])

    assert torch.equal(scaled(0), plain)
    close(scaled(all_named), scaled(0.5))
    close(scaled({"transformer": 0, "text_encoder": 0}), plain)
    assert not torch.allclose(scaled(-1), scaled(1), atol=1e-3)
    close(scaled({}), scaled(1))


def test_a_batch_of_all_flux_endpoints_equals_separate_runs(
    flux: FluxModel, edit: Pipeline, start: Image.Image, denoise: Denoise, lora_files: dict[str, Path]
) -> None:
    remake = flux_lora_image_to_image.Pipeline(flux)
    plain = flux_dev_schema.Input(
        prompt="plain", image_size={"width": 96, "height": 64}, num_inference_steps=3, seed=1
    )
    known = {"prompt": "remade", "image_url": URL, "seed": 3}
    remade = [
        flux_lora_schema.Input.model_validate(known | fields)
        for fields in (
            {"loras": [{"path": "a", "scale": 0.8}], "num_inference_steps": 4, "strength": 0.6},
            {"loras": [{"path": "b"}], "num_inference_steps": 6, "strength": 1},
        )
    ]
    edits = [
        request(loras=[{"path": "b", "scale": -0.4}, {"path": "a", "scale": {"single_blocks": 0.2}}]),
        request(scheduler="dpmpp_2m", num_inference_steps=3, use_cfg_zero=True),
        request(reference_image_url=URL, reference_strength=0.9),
    ]

    def prepared() -> list[Generation]:
        flux.noises.clear()
        files: dict[str, Any] = {URL: start, **lora_files}
        return [
            flux_dev.Pipeline(flux).prepare(plain, Assets(), 0),
            *(remake.prepare(wish, given(wish, files), 0) for wish in remade),
            *(prepare(edit, start, wish, files) for wish in edits),
        ]

    together = prepared()
    denoise([sample for generation in together for sample in generation.samples])
    for generation in together:
        generation.resources.close()
    for mixed, alone in zip(together, prepared(), strict=True):
        close(mixed.samples[0].latents[None], finished(denoise, alone))
