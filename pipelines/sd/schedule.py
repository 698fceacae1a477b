"""One sample's way through a diffusers scheduler, kept so that a step can be repeated.

A scheduler of diffusers changes itself at every step. Here each step runs on a copy, so the engine may
run a step again after a batch failed, and gets the same bytes.
"""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from diffusers import PNDMScheduler
from torch import Tensor

from pipelines.sd.schedulers import Sampler, ScheduleError, check_arrays, find


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """A scheduler as it stands before a step, and its generator. Never changed."""

    scheduler: Any
    generator: Tensor  # torch's state of a CPU generator


class Schedule:
    """The timesteps of one sample, and the state of its scheduler at the step under way.

    The tensors that it takes and gives are of one sample, float32, of any shape and device. Steps count
    from 0 and come in order; the last one taken may be repeated.
    """

    timesteps: tuple[float, ...]  # what the model is told at each step

    def __init__(
        self, sampler: Sampler, scheduler: Any, begin: int, *, from_noise: bool, eta: float, seed: int
    ) -> None:
        """`scheduler` has its timesteps set; the first `begin` of its steps are left out."""
        self._sampler = sampler
        self._from_noise = from_noise
        self._eta = eta
        self._first: int = begin * scheduler.order  # in the scheduler's own timesteps
        self._timesteps = _remaining(scheduler, begin)
        self.timesteps = tuple(self._timesteps.tolist())
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self._first)
        scheduler.scale_model_input(torch.zeros(1), self._timesteps[0])  # tells it where it stands
        generator = torch.Generator("cpu").manual_seed(step_seed(seed))
        self._states = {0: _State(scheduler, generator.get_state())}

    @classmethod
    def build(
        cls,
        name: str | None,
        config: Mapping[str, Any],
        steps: int,
        *,
        timesteps: Sequence[int] = (),
        sigmas: Sequence[float] = (),
        strength: float | None = None,
        keep_steps: bool = False,
        eta: float = 0.0,
        seed: int,
    ) -> Self:
        """The schedule of `steps` (≥ 1) steps, or of an array, in the scheduler called `name`.

        `name` is one of SCHEDULERS, None for the one that `config`, the checkpoint's scheduler_config,
        names itself. `timesteps` fall within the training's; `sigmas` are one more than there are steps,
        the last one where the way ends, usually 0. Schedulers without an eta ignore `eta` (0 … 1).

        `strength` (0 < … ≤ 1) leaves the end of the schedule:
          - the last int(steps · strength) of `steps`, at least one, as diffusers counts it: 0.5 of 30
            runs 15;
          - with `keep_steps` the last `steps` of int(steps / strength), as fal and A1111 count it:
            0.5 of 30 runs 30 of 60. Where a schedule of that many steps does not exist, the finest one
            is taken and as many of its steps as have the noise that `strength` asks for;
          - of an array always the last int(length · strength) steps.

        LCM and TCD have at most `original_inference_steps` (50) steps, others two fewer than the
        training's timesteps (998); more are clamped. Schedulers of the second order call the model
        twice a step, but for the last, and PNDM once more than there are steps.

        Raises ScheduleError for arrays that cannot be and for schedulers that are not known.
        """
        assert steps >= 1, "a schedule has at least one step"
        assert strength is None or 0 < strength <= 1, "the strength lies above 0 and up to 1"
        assert 0 <= eta <= 1, "eta lies in 0 … 1"
        sampler = find(name, config)
        scheduler = sampler.create(config)
        check_arrays(sampler, scheduler, timesteps, sigmas)
        if timesteps or sigmas:
            count = _set_array(scheduler, timesteps, sigmas)
            executed = _part(count, strength)
        else:
            count, executed = _counts(steps, _most_steps(scheduler), strength, keep_steps)
            _set_count(sampler, scheduler, count)
        return cls(sampler, scheduler, count - executed, from_noise=strength == 1, eta=eta, seed=seed)

    @property
    def steps(self) -> int:
        """How many times the model is called."""
        return len(self.timesteps)

    def start_from_noise(self, noise: Tensor) -> Tensor:
        """Standard normal noise as the scheduler wants it at the first step."""
        return noise * float(self._states[0].scheduler.init_noise_sigma)

    def start_from(self, picture: Tensor, noise: Tensor) -> Tensor:
        """A picture's latents with the noise of the first step.

        At strength 1 the picture counts for nothing: this is `start_from_noise`. (diffusers' image-to-image
        keeps a trace of it there, as the noise of the first timestep does not quite drown it.)
        """
        if self._from_noise:
            return self.start_from_noise(noise)
        scheduler = copy.deepcopy(self._states[0].scheduler)
        started: Tensor = scheduler.add_noise(picture, noise, self._timesteps[:1])
        return started

    def scaled(self, step: int, latents: Tensor) -> Tensor:
        """What the model is given for the latents at `step`."""
        scaled: Tensor = self._states[step].scheduler.scale_model_input(latents, self._timesteps[step])
        return scaled

    def advance(self, step: int, latents: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """The next latents, and the model's estimate of the finished ones. Changes neither argument.

        Noise is drawn on the CPU from a generator of the sample's own, seeded by `step_seed`, and goes
        to the latents' device: a sample's noise is the same wherever and beside whomever it runs.
        """
        before = self._states[step]
        scheduler = copy.deepcopy(before.scheduler)
        generator = torch.Generator("cpu").set_state(before.generator)
        output = scheduler.step(prediction, self._timesteps[step], latents, **self._words(generator))
        self._states = {step: before, step + 1: _State(scheduler, generator.get_state())}
        seen = _given(output)
        if seen is None:
            levels = _levels(scheduler, self._first + step, self._timesteps[step])
            seen = _denoised(scheduler, levels, latents, prediction)
        return output.prev_sample, seen

    def _words(self, generator: torch.Generator) -> dict[str, Any]:
        """What the scheduler's step is told besides."""
        words = {"eta": ("eta", self._eta), "noise": ("generator", generator)}
        return dict(pair for word, pair in words.items() if word in self._sampler.takes)


def step_seed(seed: int) -> int:
    """The seed of a sample's noise at its steps: another stream than its first noise, which `seed` gives.

    The first 8 bytes of SHA-256 of "steps <seed>", without the sign bit.
    """
    digest = hashlib.sha256(f"steps {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# How many steps


def most_steps(name: str | None, config: Mapping[str, Any]) -> int:
    """How many steps a schedule may have. Arguments and errors as of `Schedule.build`."""
    return _most_steps(find(name, config).create(config))


def _most_steps(scheduler: Any) -> int:
    """The finest schedule that there is."""
    # Two fewer, because spaced "leading" timesteps count from steps_offset, and some take one more.
    finest: int = scheduler.config.num_train_timesteps - 2
    return min(finest, int(scheduler.config.get("original_inference_steps", finest)))


def _counts(steps: int, most: int, strength: float | None, keep_steps: bool) -> tuple[int, int]:
    """How many steps the schedule has, and how many of them, the last ones, are executed."""
    if keep_steps and strength is not None:
        wanted = steps / strength
        if wanted < most + 1:
            return int(wanted), steps
        steps = most
    steps = min(steps, most)
    return steps, _part(steps, strength)


def _part(steps: int, strength: float | None) -> int:
    return steps if strength is None else max(1, int(steps * strength))


# Which timesteps


def _set_count(sampler: Sampler, scheduler: Any, steps: int) -> None:
    """Space `steps` steps as the scheduler's config says.

    Trailing ones are set as an array where the scheduler takes one: LCMScheduler knows no spacing, and
    diffusers' own sometimes has one timestep too many, -1 (of 61 steps, of 103, …). Schedulers that take
    none get the next number of steps at which that does not happen.
    """
    if scheduler.config.get("timestep_spacing") == "trailing" and "timesteps" in sampler.takes:
        scheduler.set_timesteps(timesteps=_trailing(scheduler.config.num_train_timesteps, steps))
        return
    scheduler.set_timesteps(steps)
    while scheduler.timesteps[-1] < 0:
        steps += 1
        scheduler.set_timesteps(steps)


def _trailing(train_timesteps: int, steps: int) -> list[int]:
    """Timesteps from the last of the training down (arXiv 2305.08891, table 2), in diffusers' numbers."""
    spaced = np.arange(train_timesteps, 0, -train_timesteps / steps)[:steps]
    return [int(each) - 1 for each in spaced.round()]


def _set_array(scheduler: Any, timesteps: Sequence[int], sigmas: Sequence[float]) -> int:
    """Set an array of a request; says how many steps it has."""
    try:
        if timesteps:
            scheduler.set_timesteps(timesteps=list(timesteps))
            return len(timesteps)
        scheduler.set_timesteps(sigmas=list(sigmas))
        return len(sigmas) - 1
    except ValueError as error:  # what only some checkpoints' configs forbid
        raise ScheduleError(f"The checkpoint's scheduler refuses the array: {error}") from error


def _remaining(scheduler: Any, begin: int) -> Tensor:
    """The timesteps without those of the first `begin` levels.

    PNDM goes to its second level twice. Where it begins later, that level is another one; diffusers' own
    image-to-image leaves this out and is then one level off to the end.
    """
    timesteps: Tensor = scheduler.timesteps
    if isinstance(scheduler, PNDMScheduler):
        levels = torch.unique_consecutive(timesteps)[begin:]
        return torch.cat([levels[:2], levels[1:]])
    return timesteps[begin * scheduler.order :]


# What the model sees


def _given(output: Any) -> Tensor | None:
    """The estimate of the finished latents, where a scheduler's output has one."""
    seen: Tensor | None = getattr(output, "pred_original_sample", None)
    return getattr(output, "denoised", None) if seen is None else seen


def _denoised(scheduler: Any, levels: tuple[float, float], latents: Tensor, prediction: Tensor) -> Tensor:
    """The estimate of the finished latents z, from x = alpha·z + sigma·noise with alpha² + sigma² = 1.

    The model predicts the noise, or v = alpha·noise - sigma·z (arXiv 2202.00512).
    """
    alpha, sigma = levels
    if scheduler.config.prediction_type == "v_prediction":
        return alpha * latents - sigma * prediction
    return (latents - sigma * prediction) / alpha


def _levels(scheduler: Any, index: int, timestep: Tensor) -> tuple[float, float]:
    """Alpha and sigma at a step, `index` in its own sigmas, of a scheduler that preserves variance."""
    if hasattr(scheduler, "sigmas"):
        ratio = float(scheduler.sigmas[index])
        alpha = 1 / math.sqrt(ratio**2 + 1)
        return alpha, ratio * alpha
    kept = float(scheduler.alphas_cumprod[int(timestep)])
    return math.sqrt(kept), math.sqrt(1 - kept)
