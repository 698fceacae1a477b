"""A sample's way through the schedulers, beside diffusers' own loops and beside what is known exactly."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.sd.schedule import Schedule, step_seed
from pipelines.sd.schedulers import OWN, SCHEDULERS, ScheduleError

SEED = 7
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
# As the checkpoints' scheduler_config.json have them.
SD15 = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **BETAS}
SD2_V = {"_class_name": "DDIMScheduler", **BETAS, "prediction_type": "v_prediction"}
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    **BETAS,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
CONFIGS = {"SD1.5": SD15, "SD2 (v)": SD2_V, "SDXL": SDXL}

# The API's names, and what a user of diffusers writes for them.
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler A": ("EulerAncestralDiscreteScheduler", {}),
    "Euler (trailing timesteps)": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "LCM": ("LCMScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}
NAMES = [*STOCK, "LCM (trailing timesteps)"]
RANDOM = [name for name, sampler in SCHEDULERS.items() if "noise" in sampler.takes]
STEADY = [name for name in NAMES if name not in RANDOM] + ["DDIM", "TCD"]  # at eta 0

Model = Callable[[Tensor, float], Tensor]
"""Latents as the scheduler scales them, and a timestep → the prediction."""


def stock(name: str, config: Mapping[str, Any]) -> Any:
    kind, options = STOCK[name]
    return getattr(diffusers, kind).from_config(dict(config), **options)


def generator(seed: int = SEED) -> torch.Generator:
    """The noise of the steps, as the schedule documents it."""
    return torch.Generator().manual_seed(step_seed(seed))


def noise(seed: int = 0) -> Tensor:
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))


def of_pictures(config: Mapping[str, Any], mean: float, spread: float) -> Model:
    """What a perfect model predicts where pictures are normal: around `mean`, `spread` wide."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = torch.cumprod(1 - betas, 0)

    def predict(latents: Tensor, timestep: float) -> Tensor:
        alpha, sigma = kept[round(timestep)] ** 0.5, (1 - kept[round(timestep)]) ** 0.5
        noise = sigma * (latents - alpha * mean) / (alpha**2 * spread**2 + sigma**2)
        picture = (latents - sigma * noise) / alpha
        return alpha * noise - sigma * picture if config.get("prediction_type") == "v_prediction" else noise

    return predict


def run(schedule: Schedule, model: Model, latents: Tensor) -> Tensor:
    """All steps, with nothing repeated."""
    for step, timestep in enumerate(schedule.timesteps):
        latents, _ = schedule.advance(step, latents, model(schedule.scaled(step, latents), timestep))
    return latents


def run_stock(scheduler: Any, timesteps: Tensor, model: Model, latents: Tensor, eta: float = 0.0) -> Tensor:
    """The loop of diffusers' pipelines."""
    given = {"eta": eta, "generator": generator()}
    taken = inspect.signature(scheduler.step).parameters
    words = {word: value for word, value in given.items() if word in taken}
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(model(scaled, timestep.item()), timestep, latents, **words)[0]
    return latents


def test_the_names_are_those_of_the_api() -> None:
    assert sorted(SCHEDULERS) == sorted(NAMES)


@pytest.mark.parametrize(
    "sampler", [*SCHEDULERS.values(), *OWN.values()], ids=lambda each: each.type.__name__
)
def test_what_a_scheduler_is_said_to_take_diffusers_takes(sampler: Any) -> None:
    arrays = set(inspect.signature(sampler.type.set_timesteps).parameters)
    words = set(inspect.signature(sampler.type.step).parameters)
    assert sampler.takes & {"timesteps", "sigmas"} <= arrays
    assert ("eta" in sampler.takes) == ("eta" in words)
    assert "noise" not in sampler.takes or "generator" in words


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).requires_grad_(False)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", [*STOCK, None])
def test_the_latents_are_those_of_diffusers_pipeline(
    name: str | None, config: dict[str, Any], unet: Any
) -> None:
    own = getattr(diffusers, config["_class_name"]).from_config(config)
    text = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=own if name is None else stock(name, config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt_embeds=text,
        latents=noise()[None],
        num_inference_steps=6,
        guidance_scale=1,
        eta=0.3,
        generator=generator(),
        output_type="latent",
    ).images[0]

    schedule = Schedule.build(name, config, 6, eta=0.3, seed=SEED)
    ours = run(schedule, lambda x, t: unet(x[None], t, text).sample[0], schedule.start_from_noise(noise()))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize(("steps", "strength"), [(20, 0.5), (7, 0.95), (30, 0.1)])
def test_the_latents_from_a_picture_are_those_of_diffusers_loop(
    name: str, config: dict[str, Any], steps: int, strength: float
) -> None:
    model, picture = of_pictures(config, 0.3, 0.5), noise(1)
    scheduler = stock(name, config)
    scheduler.set_timesteps(steps)
    pipe: Any = SimpleNamespace(scheduler=scheduler)
    timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipe, steps, strength, "cpu")
    theirs = scheduler.add_noise(picture, noise(), timesteps[:1])

    schedule = Schedule.build(name, config, steps, strength=strength, eta=0.6, seed=SEED)
    ours = schedule.start_from(picture, noise())
    assert schedule.timesteps == tuple(timesteps.tolist())
    assert torch.equal(ours, theirs)
    assert torch.equal(run(schedule, model, ours), run_stock(scheduler, timesteps, model, theirs, eta=0.6))


@pytest.mark.parametrize(
    ("kind", "strength"),
    # From a picture, diffusers' PNDM is one level off: see below.
    [
        (kind, strength)
        for kind in OWN
        for strength in (None, 0.45)
        if (kind, strength) != ("PNDMScheduler", 0.45)
    ],
)
def test_a_checkpoints_own_scheduler_runs_as_diffusers_runs_it(kind: str, strength: float | None) -> None:
    config, picture = {**SDXL, "_class_name": kind}, noise(1)
    model = of_pictures(config, 0.3, 0.5)
    scheduler = getattr(diffusers, kind).from_config(config)
    scheduler.set_timesteps(11)
    pipe: Any = SimpleNamespace(scheduler=scheduler)
    timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipe, 11, strength or 1, "cpu")
    schedule = Schedule.build(None, config, 11, strength=strength, seed=SEED)
    if strength:
        start, theirs = (
            schedule.start_from(picture, noise()),
            scheduler.add_noise(picture, noise(), timesteps[:1]),
        )
    else:
        start, theirs = schedule.start_from_noise(noise()), noise() * scheduler.init_noise_sigma
    assert schedule.timesteps == tuple(timesteps.tolist())
    assert torch.equal(start, theirs)
    assert torch.equal(run(schedule, model, start), run_stock(scheduler, timesteps, model, theirs))


def test_every_other_scheduler_of_a_checkpoint_is_refused_by_name() -> None:
    unknown = {each.name for each in KarrasDiffusionSchedulers} - set(OWN)
    assert {each.removesuffix("Scheduler") for each in unknown} == {
        "LMSDiscrete",
        "KDPM2Discrete",
        "KDPM2AncestralDiscrete",
        "DPMSolverSDE",
        "EDMEuler",
    }
    for kind in (*unknown, "FlowMatchEulerDiscreteScheduler", None):
        with pytest.raises(ScheduleError, match=f"own scheduler, {kind}, .*name one of DPM"):
            Schedule.build(None, {**SDXL, "_class_name": kind}, 5, seed=SEED)


def test_a_name_means_the_same_on_every_checkpoint() -> None:
    odd = {**SD15, "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    odd |= {"final_sigmas_type": "sigma_min"}
    for name in ("DPM++ 2M", "DPM++ 2M Karras", "Euler"):
        assert torch.equal(*ends(name, SD15, [1]), *ends(name, odd, [1]))
    trailing = {**SDXL, "timestep_spacing": "trailing"}
    assert Schedule.build("LCM", trailing, 4, seed=0).timesteps == (999, 759, 499, 259)


def test_a_config_may_come_from_the_file_or_from_a_scheduler() -> None:
    """What the file does not say is each scheduler's own default: a loaded config knows what that was."""
    loaded = diffusers.PNDMScheduler.from_config(SD15).config
    for name in (*NAMES, None):
        ways = [Schedule.build(name, config, 9, seed=0).timesteps for config in (SD15, loaded)]
        assert ways[0] == ways[1]


@pytest.mark.parametrize("name", ["LCM (trailing timesteps)", "Euler (trailing timesteps)"])
@given(steps=st.integers(1, 50))
@settings(max_examples=25)
def test_trailing_timesteps_are_spaced_evenly_down_from_the_last(name: str, steps: int) -> None:
    timesteps = Schedule.build(name, SDXL, steps, seed=0).timesteps
    assert len(timesteps) == steps
    assert timesteps == pytest.approx([1000 - 1000 * step / steps - 1 for step in range(steps)], abs=0.51)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("steps", [61, 121, 122])
def test_trailing_timesteps_never_go_below_zero(kind: str, steps: int) -> None:
    """diffusers' own do at these numbers, by a rounding of numpy's."""
    config = {**SDXL, "timestep_spacing": "trailing", "_class_name": kind}
    theirs = getattr(diffusers, kind).from_config(config)
    theirs.set_timesteps(steps)
    assert theirs.timesteps[-1] == -1
    timesteps = Schedule.build(None, config, steps, seed=0).timesteps
    assert len(timesteps) - steps in (0, 1, 2, 3)
    assert 0 <= timesteps[-1] < 1000 / steps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", [*NAMES, *OWN])
@given(steps=st.integers(1, 150), strength=st.floats(0, 1, exclude_min=True), keep=st.booleans())
@settings(max_examples=15)
def test_every_schedule_stays_inside_the_training(
    name: str, spacing: str, steps: int, strength: float, keep: bool
) -> None:
    config = {**SDXL, "_class_name": name, "timestep_spacing": spacing}
    known = name if name in SCHEDULERS else None
    schedule = Schedule.build(known, config, steps, strength=strength, keep_steps=keep, seed=SEED)
    assert 1 <= schedule.steps <= 2 * steps + 1
    assert 0 <= min(schedule.timesteps)
    assert max(schedule.timesteps) <= 999
    assert list(schedule.timesteps) == sorted(schedule.timesteps, reverse=True)
    assert schedule.start_from(noise(1), noise()).isfinite().all()


# steps, strength, how many run of them, how many of 60 …
COUNTS = [
    (30, 1.0, 30, 30),
    (30, 0.5, 15, 30),
    (30, 0.99, 29, 30),
    (30, 0.01, 1, 9),  # 3000 steps do not exist: the last 9 of 998
    (30, 0.001, 1, 1),
    (1, 0.5, 1, 1),
    (150, 0.1, 15, 99),
    (3, 0.3, 1, 3),
]


@pytest.mark.parametrize("name", ["Euler", "DDIM", "DPM++ 2M Karras", "Euler A"])
@pytest.mark.parametrize(("steps", "strength", "part", "kept"), COUNTS)
def test_strength_leaves_the_end_of_a_schedule(
    name: str, steps: int, strength: float, part: int, kept: int
) -> None:
    full = Schedule.build(name, SDXL, steps, seed=0).timesteps
    assert Schedule.build(name, SDXL, steps, strength=strength, seed=0).timesteps == full[-part:]
    finer = Schedule.build(name, SDXL, min(998, int(steps / strength)), seed=0).timesteps
    keeping = Schedule.build(name, SDXL, steps, strength=strength, keep_steps=True, seed=0)
    assert keeping.timesteps == finer[-kept:]


@pytest.mark.parametrize("name", ["LCM", "LCM (trailing timesteps)", "TCD"])
def test_few_step_schedulers_have_fifty_steps_at_most(name: str) -> None:
    def steps(number: int, **strength: Any) -> int:
        return Schedule.build(name, SDXL, number, seed=0, **strength).steps

    assert [steps(number) for number in (4, 50, 51, 150)] == [4, 50, 50, 50]
    assert [steps(number, strength=0.5) for number in (4, 50, 150)] == [2, 25, 25]
    assert [steps(number, strength=0.5, keep_steps=True) for number in (4, 25, 30)] == [4, 25, 25]
    assert steps(4, strength=1e-320, keep_steps=True) == 1


@given(steps=st.integers(1, 150), strength=st.floats(0.01, 1))
@settings(max_examples=50)
def test_keeping_the_steps_keeps_the_noise_that_strength_asks_for(steps: int, strength: float) -> None:
    build = Schedule.build
    schedule = build("Euler (trailing timesteps)", SDXL, steps, strength=strength, keep_steps=True, seed=0)
    level = (schedule.timesteps[0] + 1) / 1000
    assert level == pytest.approx(strength, abs=strength / steps + 0.002)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", [*NAMES, None])
def test_strength_one_is_text_to_image(name: str | None, keep: bool) -> None:
    plain = Schedule.build(name, SD15, 12, seed=SEED)
    full = Schedule.build(name, SD15, 12, strength=1, keep_steps=keep, seed=SEED)
    assert full.timesteps == plain.timesteps
    start = full.start_from(noise(1), noise())
    assert torch.equal(start, plain.start_from_noise(noise()))
    model = of_pictures(SD15, 0.3, 0.5)
    assert torch.equal(run(full, model, start), run(plain, model, start))


def test_second_order_schedulers_call_the_model_twice_a_step_but_for_the_last() -> None:
    heun = {**SDXL, "_class_name": "HeunDiscreteScheduler"}
    assert Schedule.build(None, heun, 30, seed=0).steps == 59
    assert Schedule.build(None, heun, 30, strength=0.5, seed=0).steps == 29


def with_exact_end(name: str | None, config: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The config with which the last step leads to the picture itself, and how near it comes."""
    # LCM mixes in a little of its input; TCD ends at the noise of timestep 0; Karras' sigmas fall
    # between the timesteps that the model is told.
    near = {"TCD": 0.1, "LCM": 1e-3, "LCM (trailing timesteps)": 1e-3}
    return {**config, "set_alpha_to_one": True}, near.get(name or "", 1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", [*NAMES, None])
@pytest.mark.parametrize("strength", [None, 0.6])
def test_where_the_model_always_sees_the_same_picture_the_end_is_that_picture(
    name: str | None, config: dict[str, Any], strength: float | None
) -> None:
    exact, near = with_exact_end(name, config)
    schedule = Schedule.build(name, exact, 20, strength=strength, seed=SEED)
    start = schedule.start_from(torch.full((4, 8, 8), 0.3), noise()) if strength else None
    end = run(
        schedule, of_pictures(config, 0.3, 0), schedule.start_from_noise(noise()) if start is None else start
    )
    torch.testing.assert_close(end, torch.full((4, 8, 8), 0.3), atol=near, rtol=0)


def test_pndm_begins_in_the_middle_without_being_a_level_off() -> None:
    config, picture = {**SD15, "set_alpha_to_one": True}, torch.full((4, 8, 8), 0.3)
    model = of_pictures(config, 0.3, 0)
    schedule = Schedule.build(None, config, 10, strength=0.5, seed=0)
    assert schedule.timesteps == (401, 301, 301, 201, 101, 1)
    scheduler = diffusers.PNDMScheduler.from_config(config)
    scheduler.set_timesteps(10)
    theirs = run_stock(
        scheduler,
        scheduler.timesteps[5:],
        model,
        scheduler.add_noise(picture, noise(), scheduler.timesteps[5:6]),
    )
    ours = run(schedule, model, schedule.start_from(picture, noise()))
    assert (ours - picture).abs().max() < 1e-4 < 1e-2 < (theirs - picture).abs().max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_every_step_tells_what_picture_the_model_sees(name: str, config: dict[str, Any]) -> None:
    known = name if name in SCHEDULERS else None
    config = {**config, "_class_name": name}
    schedule = Schedule.build(known, config, 10, strength=0.8, seed=SEED)
    model, latents = of_pictures(config, 0.3, 0), schedule.start_from(torch.full((4, 8, 8), 0.3), noise())
    for step, timestep in enumerate(schedule.timesteps):
        prediction = model(schedule.scaled(step, latents), timestep)
        latents, seen = schedule.advance(step, latents, prediction)
        # The model is told whole timesteps; some schedulers stand between them.
        near = 0.1 if "Karras" in name else 2e-3
        torch.testing.assert_close(seen, torch.full((4, 8, 8), 0.3), atol=near, rtol=0)


@pytest.mark.parametrize("name", [each for each in STEADY if each != "TCD"])
def test_more_steps_come_nearer_to_the_exact_way(name: str) -> None:
    """Of normal pictures it is known: their distance from the mean, in their spread, stays."""
    config, _ = with_exact_end(name, SD15)
    model = of_pictures(config, 0.3, 0.5)

    def error(steps: int) -> float:
        schedule = Schedule.build(name, config, steps, seed=0)
        start = schedule.start_from_noise(noise())
        kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
        kept = kept[int(schedule.timesteps[0])]
        spread = (kept * 0.25 + 1 - kept) ** 0.5
        exact = 0.3 + 0.5 * (schedule.scaled(0, start) - kept**0.5 * 0.3) / spread
        return (run(schedule, model, start) - exact).abs().max().item()

    errors = [error(steps) for steps in (10, 20, 40, 80)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3


@pytest.mark.parametrize("name", ["DPM++ 2M SDE", "DPM++ 2M SDE Karras", "Euler A", "DDIM"])
def test_random_steps_make_pictures_of_the_right_spread(name: str) -> None:
    schedule = Schedule.build(name, {**SD15, "set_alpha_to_one": True}, 150, eta=1, seed=SEED)
    start = schedule.start_from_noise(torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)))
    end = run(schedule, of_pictures(SD15, 0.3, 0.5), start)
    assert end.mean().item() == pytest.approx(0.3, abs=0.02)
    assert end.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_a_repeated_step_gives_the_same_bytes_and_leaves_no_trace(name: str) -> None:
    config = {**SDXL, "_class_name": name}
    known = name if name in SCHEDULERS else None
    build = [Schedule.build(known, config, 9, eta=0.7, seed=SEED) for _ in range(2)]
    model = of_pictures(config, 0.3, 0.5)
    latents = build[0].start_from_noise(noise())
    once = run(build[0], model, latents)
    schedule = build[1]
    with torch.inference_mode():  # as the engine runs
        for step, timestep in enumerate(schedule.timesteps):
            before, prediction = latents.clone(), model(schedule.scaled(step, latents), timestep)
            kept = prediction.clone()
            schedule.advance(step, latents * 2, prediction + 1)  # a batch that failed after this row
            first = schedule.advance(step, latents, prediction)
            again = schedule.advance(step, latents, model(schedule.scaled(step, latents), timestep))
            assert all(map(torch.equal, first, again))
            assert torch.equal(latents, before)
            assert torch.equal(prediction, kept)
            latents = again[0]
    assert torch.equal(latents, once)


@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_starting_changes_nothing(name: str) -> None:
    config = {**SDXL, "_class_name": name}
    known = name if name in SCHEDULERS else None
    fresh, started = (Schedule.build(known, config, 5, strength=0.9, seed=SEED) for _ in range(2))
    started.start_from(noise(1).to("meta"), noise().to("meta"))
    assert torch.equal(started.start_from(noise(1), noise()), fresh.start_from(noise(1), noise()))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_joins_midway_goes_as_alone(name: str) -> None:
    model = of_pictures(SDXL, 0.3, 0.5)

    def schedules() -> list[Schedule]:
        return [Schedule.build(name, SDXL, 8, eta=0.5, seed=seed) for seed in (1, 2)]

    alone = [run(each, model, each.start_from_noise(noise(seed))) for seed, each in enumerate(schedules())]
    together = schedules()
    latents = [each.start_from_noise(noise(seed)) for seed, each in enumerate(together)]
    for turn in range(11):
        for row, step in ((0, turn), (1, turn - 3)):
            if 0 <= step < 8:
                schedule = together[row]
                prediction = model(schedule.scaled(step, latents[row]), schedule.timesteps[step])
                latents[row], _ = schedule.advance(step, latents[row], prediction)
    assert all(map(torch.equal, alone, latents))


def ends(name: str | None, config: dict[str, Any], seeds: Sequence[int], eta: float = 0) -> list[Tensor]:
    """The ends of runs that differ in the seed of their steps alone."""
    model = of_pictures(config, 0.3, 0.5)
    built = [Schedule.build(name, config, 6, eta=eta, seed=seed) for seed in seeds]
    return [run(each, model, each.start_from_noise(noise())) for each in built]


@pytest.mark.parametrize("name", [*STEADY, None])
def test_without_eta_nothing_is_drawn(name: str | None) -> None:
    one, other = ends(name, SD15, [1, 2])
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_drawn_depends_on_the_samples_seed_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    one, other = ends(name, SD15, [1, 2], eta=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(ends(name, SD15, [1], eta=1)[0], one)
    assert not torch.allclose(one, other, atol=0.01)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("DDIM", "TCD")])
def test_eta_is_for_ddim_and_tcd(name: str) -> None:
    assert torch.equal(*ends(name, SD15, [1], eta=0), *ends(name, SD15, [1], eta=1))


@given(seed=st.integers(0, 2**64))
def test_the_steps_draw_other_numbers_than_the_start(seed: int) -> None:
    assert step_seed(seed) != seed
    assert 0 <= step_seed(seed) < 2**63


@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_latents_stay_on_their_device(name: str) -> None:
    """On the meta device, which like a GPU does not mix with the CPU's tensors."""
    known = name if name in SCHEDULERS else None
    schedule = Schedule.build(known, {**SDXL, "_class_name": name}, 5, strength=0.9, eta=1, seed=SEED)
    far = noise().to("meta")
    latents = schedule.start_from(far, far)
    for step in range(schedule.steps):
        latents, seen = schedule.advance(step, latents, schedule.scaled(step, latents))
        assert {each.device.type for each in (latents, seen)} == {"meta"}
        assert {each.dtype for each in (latents, seen)} == {torch.float32}


def test_latents_beyond_one_are_not_clipped() -> None:
    """Checkpoints without a clip_sample would get DDIM's default, which is for pixels."""
    config = {key: value for key, value in SDXL.items() if key != "clip_sample"}
    end = ends("DDIM", config, [1])[0]
    assert torch.equal(end, ends("DDIM", SDXL, [1])[0])
    far = Schedule.build("DDIM", config, 10, seed=0)
    assert run(far, of_pictures(config, 5, 0), noise()).mean().item() == pytest.approx(5, abs=0.1)


TIMESTEPS = [999, 700, 400, 150, 20]
SIGMAS = [14.6, 6.5, 2.7, 0.9, 0.3, 0.0]


@pytest.mark.parametrize("name", [name for name in NAMES if "timesteps" in SCHEDULERS[name].takes])
def test_timesteps_of_a_request_are_the_models(name: str) -> None:
    schedule = Schedule.build(name, SDXL, 30, timesteps=TIMESTEPS, seed=0)
    assert schedule.timesteps == tuple(TIMESTEPS)
    end = run(schedule, of_pictures(SDXL, 0.3, 0), schedule.start_from_noise(noise()))
    torch.testing.assert_close(end, torch.full_like(end, 0.3), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", ["Euler", "Euler (trailing timesteps)"])
def test_sigmas_of_a_request_are_the_schedulers(name: str) -> None:
    schedule = Schedule.build(name, SDXL, 30, sigmas=SIGMAS, seed=0)
    latents = schedule.start_from_noise(noise())
    for step, sigma in enumerate(SIGMAS[:-1]):
        scaled = schedule.scaled(step, latents)
        torch.testing.assert_close(scaled * (sigma**2 + 1) ** 0.5, latents)
        latents, seen = schedule.advance(step, latents, torch.ones_like(latents))
        assert schedule.timesteps[step] >= 0
    torch.testing.assert_close(latents, seen)  # the last sigma is 0
    assert schedule.steps == 5


@pytest.mark.parametrize("keep", [False, True])
def test_strength_leaves_the_end_of_an_array(keep: bool) -> None:
    def of(**given: Any) -> tuple[float, ...]:
        return Schedule.build("Euler", SDXL, 30, strength=0.5, keep_steps=keep, seed=0, **given).timesteps

    assert of(timesteps=TIMESTEPS) == (150, 20)
    whole = Schedule.build("Euler", SDXL, 30, sigmas=SIGMAS, seed=0).timesteps
    assert of(sigmas=SIGMAS) == whole[-2:]
    assert of(timesteps=[500]) == (500,)


def test_an_empty_array_is_none() -> None:
    given = Schedule.build("DDIM", SDXL, 4, timesteps=[], sigmas=(), seed=0)
    assert given.timesteps == Schedule.build("DDIM", SDXL, 4, seed=0).timesteps


BAD: list[tuple[str | None, dict[str, Any], str]] = [
    # both
    ("Euler", {"timesteps": [9, 1], "sigmas": [9, 1, 0]}, "exclude each other"),
    # not for this scheduler
    *((name, {"timesteps": [9, 1]}, "takes no timesteps; .* DPM[+][+] 2M, ") for name in NAMES
      if name in ("DPM++ 2M Karras", "DPM++ 2M SDE Karras", "Euler A", "DDIM")),
    *((name, {"sigmas": [9, 1, 0]}, "takes no sigmas; .* Euler, ") for name in NAMES if "Euler" not in name),
    ("Euler A", {"sigmas": [9, 1, 0]}, "takes no sigmas"),
    (None, {"timesteps": [9, 1]}, "takes no timesteps"),  # PNDM
    # not in order
    ("Euler", {"timesteps": [1, 9]}, "fall from one to the next; 9 after 1"),
    ("LCM", {"timesteps": [9, 9]}, "fall from one to the next; 9 after 9"),
    ("Euler", {"sigmas": [1, 9, 0]}, "fall from one to the next; 9 after 1"),
    ("Euler", {"sigmas": [9, 9, 0]}, "fall from one to the next; 9 after 9"),
    # out of range
    ("TCD", {"timesteps": [1000, 9]}, "lie in 0 … 999, 1000"),
    ("DPM++ 2M", {"timesteps": [9, -1]}, "lie in 0 … 999, -1"),
    ("Euler", {"sigmas": [9, -0.1]}, "from 0 up, -0.1"),
    ("Euler", {"sigmas": [float("inf"), 0]}, "from 0 up, inf"),
    ("Euler", {"sigmas": [9, float("nan"), 0]}, "from 0 up, nan"),
    # too few, too many
    ("Euler", {"sigmas": [9]}, "at least two"),
    ("Euler", {"timesteps": list(range(150, -1, -1))}, "At most 150 entries are taken, 151"),
    ("Euler", {"sigmas": list(range(151, -1, -1))}, "At most 151 entries are taken, 152"),
    # no such scheduler
    ("euler", {}, "no scheduler 'euler'; there are DPM"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "sentence"), BAD)
def test_what_cannot_be_is_said_in_a_sentence(name: str | None, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ScheduleError, match=sentence):
        Schedule.build(name, SD15, 10, **given, seed=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_karras_sigmas": True}, "takes no timesteps"),
        ({"timestep_type": "continuous", "prediction_type": "v_prediction"}, "refuses the array"),
        ({"prediction_type": "sample"}, "prediction_type is sample"),
        ({"beta_schedule": "unheard"}, "config cannot be used"),
    ],
)
def test_what_a_checkpoints_config_forbids_is_said_in_a_sentence(
    change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ScheduleError, match=sentence):
        Schedule.build(None, {**SDXL, **change}, 10, timesteps=[9, 1], seed=0)
