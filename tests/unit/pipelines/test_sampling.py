"""Schedules and samplers as pure functions, beside diffusers' own and beside the exact solution."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipelines.flux.sampling import SIGMA_MIN, dpmpp_2m, etas, euler, schedule

STEPS = st.integers(1, 50)
MU = st.floats(0.01, 5)
SPACINGS = ["even", "sgm_uniform", "beta"]


@pytest.mark.parametrize("spacing", SPACINGS)
@given(steps=STEPS, mu=MU)
def test_sigmas_fall_from_one_to_zero(spacing: Any, steps: int, mu: float) -> None:
    sigmas = schedule(steps, mu, spacing)
    assert len(sigmas) == steps + 1
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert all(one > other for one, other in zip(sigmas, sigmas[1:], strict=False))


@pytest.mark.parametrize(("spacing", "option"), [("even", {}), ("beta", {"use_beta_sigmas": True})])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_sigmas_are_those_of_diffusers(spacing: Any, option: dict[str, bool], steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **option)
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], mu=1.15)
    ours = torch.tensor(schedule(steps, 1.15, spacing))
    torch.testing.assert_close(ours, scheduler.sigmas, atol=1e-6, rtol=0)


def test_sgm_uniform_ends_a_step_before_the_least_sigma() -> None:
    unshifted = schedule(10, None, "sgm_uniform")
    spaces = [one - other for one, other in zip(unshifted[:-1], unshifted[1:-1], strict=False)]
    assert spaces == pytest.approx([(1 - SIGMA_MIN) / 10] * 9)
    assert unshifted[-2] - spaces[0] == pytest.approx(SIGMA_MIN)


def test_beta_sigmas_are_dense_at_both_ends() -> None:
    sigmas = schedule(20, None, "beta")
    spaces = [one - other for one, other in zip(sigmas[:-1], sigmas[1:-1], strict=False)]
    assert max(spaces[0], spaces[-1]) < min(spaces[8:11])


def run(velocity: Any, sigmas: tuple[float, ...], sampler: str) -> Tensor:
    """A whole denoising of three numbers."""
    latents, previous = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64), None
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        field = velocity(latents, sigma)
        if sampler == "euler":
            latents = euler(latents, field, sigma, following)
            continue
        seen = latents - sigma * field
        latents = dpmpp_2m(latents, seen, previous, (sigmas[max(0, step - 1)], sigma, following))
        previous = seen
    return latents


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@given(steps=STEPS, mu=MU, seen=st.floats(-3, 3))
def test_every_sampler_is_exact_where_the_picture_seen_is_always_the_same(
    sampler: str, steps: int, mu: float, seen: float
) -> None:
    end = run(lambda x, sigma: (x - seen) / sigma, schedule(steps, mu), sampler)
    assert end.tolist() == pytest.approx([seen] * 3, abs=1e-9)


def test_one_step_of_the_second_order_is_a_step_of_the_first() -> None:
    latents, seen = torch.randn(4, 8), torch.randn(4, 8)
    velocity = (latents - seen) / 0.7
    torch.testing.assert_close(
        dpmpp_2m(latents, seen, None, (0.7, 0.7, 0.3)), euler(latents, velocity, 0.7, 0.3)
    )


def test_the_second_order_needs_fewer_steps() -> None:
    def velocity(x: Tensor, sigma: float) -> Tensor:
        """Of pictures that are standard normal around 2: the picture seen bends on the way."""
        spread = (1 - sigma) ** 2 + sigma**2
        return (2 * sigma - 1) * (x - (1 - sigma) * 2) / spread - 2

    exact = run(velocity, schedule(10_000, None), "euler")
    errors = {
        sampler: [(run(velocity, schedule(n, None), sampler) - exact).norm().item() for n in (8, 16, 32)]
        for sampler in ("euler", "dpmpp_2m")
    }
    for falling in errors.values():
        assert falling == sorted(falling, reverse=True)
    assert all(two < one / 2 for one, two in zip(errors["euler"], errors["dpmpp_2m"], strict=True))


@given(steps=STEPS, start=st.integers(0, 60), end=st.integers(0, 60), eta=st.floats(0.01, 3))
def test_eta_acts_inside_its_steps_only(steps: int, start: int, end: int, eta: float) -> None:
    values = etas(steps, eta, start, end, "constant")
    assert values == tuple(eta if start <= step < end else 0.0 for step in range(steps))


@given(steps=st.integers(2, 50), eta=st.floats(0.01, 3))
def test_eta_rises_or_falls_in_even_steps(steps: int, eta: float) -> None:
    rising = etas(steps, eta, 0, steps, "linear_increase")
    assert rising[0] == 0
    assert rising[-1] == pytest.approx(eta)
    spaces = [other - one for one, other in zip(rising, rising[1:], strict=False)]
    assert spaces == pytest.approx([eta / (steps - 1)] * (steps - 1))
    falling = etas(steps, eta, 0, steps, "linear_decrease")
    assert falling == pytest.approx(rising[::-1])


@pytest.mark.parametrize("shape", ["constant", "linear_increase", "linear_decrease"])
def test_a_single_step_gets_all_of_eta(shape: Any) -> None:
    assert etas(4, 0.7, 2, 3, shape) == (0, 0, 0.7, 0)


def test_shifting_is_monotone_in_mu() -> None:
    low, high = schedule(10, 0.5), schedule(10, 1.15)
    assert all(one < other for one, other in zip(low[1:-1], high[1:-1], strict=True))
    assert math.isclose(schedule(10, 0.0)[5], 0.5)
