"""The schedulers: by the names of the API, and by the class names that checkpoints carry.

All of them are diffusers' own. What stands here is which class a name means, how it is set up, and what
a request may say to it.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

Word = Literal["timesteps", "sigmas", "eta", "noise"]
"""What a scheduler listens to: two arrays in place of a number of steps, eta, and a generator."""


MOST_STEPS = 150  # of an array, as the API has them; sigmas are one more

PREDICTION_TYPES = ("epsilon", "v_prediction")

# Latents do not live in [-1, 1]: diffusers' pipelines turn clipping off too, and its documentation
# advises against thresholding. PNDM's Runge-Kutta steps are skipped as every Stable Diffusion does; their
# bookkeeping cannot begin in the middle of a schedule.
ALWAYS = {"clip_sample": False, "thresholding": False, "skip_prk_steps": True}


class ScheduleError(ValueError):
    """A schedule that cannot be; the message says why, in a sentence for whoever asked for it."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """A diffusers scheduler, what it takes, and the options that override a checkpoint's config."""

    type: Any
    takes: frozenset[Word] = frozenset()
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def create(self, config: Mapping[str, Any]) -> Any:
        """A scheduler with the betas, prediction type and spacing of a checkpoint's `scheduler_config`.

        Keys of other schedulers are left out. Raises ScheduleError for values that diffusers refuses.
        """
        known = inspect.signature(self.type.__init__).parameters
        kept = {key: value for key, value in config.items() if key in (*known, "_use_default_values")}
        options = {key: value for key, value in {**ALWAYS, **self.options}.items() if key in known}
        try:
            scheduler = self.type.from_config(kept, **options)
        except (ValueError, NotImplementedError) as error:
            raise ScheduleError(f"The checkpoint's scheduler config cannot be used: {error}") from error
        if scheduler.config.prediction_type not in PREDICTION_TYPES:
            raise ScheduleError(
                f"The checkpoint's prediction_type is {scheduler.config.prediction_type}; "
                f"known are {' and '.join(PREDICTION_TYPES)}."
            )
        return scheduler


# Options that replace the spacing of timesteps, and with it what a request's own timesteps would say.
REPLACING = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

# A name means the same on every checkpoint, whatever other scheduler the checkpoint was saved with.
_PLAIN = dict.fromkeys(REPLACING, False)
_KARRAS = {**_PLAIN, "use_karras_sigmas": True}
_2M = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
}
_EULER = {**_PLAIN, "final_sigmas_type": "zero"}
_SDE = {**_2M, "algorithm_type": "sde-dpmsolver++"}


def _sampler(kind: Any, *takes: Word, **options: Any) -> Sampler:
    return Sampler(kind, frozenset(takes), MappingProxyType(options))


SCHEDULERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "DPM++ 2M": _sampler(DPMSolverMultistepScheduler, "timesteps", **_2M, **_PLAIN),
        "DPM++ 2M Karras": _sampler(DPMSolverMultistepScheduler, **_2M, **_KARRAS),
        "DPM++ 2M SDE": _sampler(DPMSolverMultistepScheduler, "timesteps", "noise", **_SDE, **_PLAIN),
        "DPM++ 2M SDE Karras": _sampler(DPMSolverMultistepScheduler, "noise", **_SDE, **_KARRAS),
        "Euler": _sampler(EulerDiscreteScheduler, "timesteps", "sigmas", **_EULER),
        "Euler A": _sampler(EulerAncestralDiscreteScheduler, "noise"),
        "Euler (trailing timesteps)": _sampler(
            EulerDiscreteScheduler, "timesteps", "sigmas", **_EULER, timestep_spacing="trailing"
        ),
        # LCMScheduler has a timestep_spacing and ignores it; Schedule heeds it.
        "LCM": _sampler(LCMScheduler, "timesteps", "noise", timestep_spacing="leading"),
        "LCM (trailing timesteps)": _sampler(LCMScheduler, "timesteps", "noise", timestep_spacing="trailing"),
        "DDIM": _sampler(DDIMScheduler, "eta", "noise"),
        "TCD": _sampler(TCDScheduler, "timesteps", "eta", "noise", timestep_spacing="leading"),
    }
)
"""The API's names."""

# Left out: LMSDiscrete, whose coefficients are wrong when it begins in the middle; KDPM2 and its ancestral
# kind, which are rare and take a third of a second to create; DPMSolverSDE, which draws its noise by a
# library of its own; EDM ones, whose models take another input.
OWN: Mapping[str, Sampler] = MappingProxyType(
    {
        sampler.type.__name__: sampler
        for sampler in (
            _sampler(DDIMScheduler, "eta", "noise"),
            _sampler(DDPMScheduler, "timesteps", "noise"),
            _sampler(DEISMultistepScheduler),
            _sampler(DPMSolverMultistepScheduler, "timesteps", "noise"),
            _sampler(DPMSolverSinglestepScheduler, "timesteps", "noise"),
            _sampler(EulerAncestralDiscreteScheduler, "noise"),
            _sampler(EulerDiscreteScheduler, "timesteps", "sigmas"),
            _sampler(HeunDiscreteScheduler, "timesteps"),
            _sampler(LCMScheduler, "timesteps", "noise", timestep_spacing="leading"),
            _sampler(PNDMScheduler),
            _sampler(TCDScheduler, "timesteps", "eta", "noise", timestep_spacing="leading"),
            _sampler(UniPCMultistepScheduler),
        )
    }
)
"""By a checkpoint's "_class_name"."""


def find(name: str | None, config: Mapping[str, Any]) -> Sampler:
    """The scheduler of the API's `name`, or for None the one that a checkpoint's config names.

    Raises ScheduleError where there is none.
    """
    if name is not None:
        if name not in SCHEDULERS:
            raise ScheduleError(f"There is no scheduler {name!r}; there are {_listed(SCHEDULERS)}.")
        return SCHEDULERS[name]
    own = OWN.get(str(config.get("_class_name")))
    if own is None:
        raise ScheduleError(
            f"The checkpoint's own scheduler, {config.get('_class_name')}, is not known here; "
            f"name one of {_listed(SCHEDULERS)}."
        )
    if any(config.get(option) for option in REPLACING):
        return replace(own, takes=own.takes - {"timesteps"})
    return own


def check_arrays(sampler: Sampler, scheduler: Any, timesteps: Sequence[int], sigmas: Sequence[float]) -> None:
    """Raise ScheduleError unless at most one array is given, and one that the scheduler can follow."""
    if timesteps and sigmas:
        raise ScheduleError("Timesteps and sigmas exclude each other: give one of them.")
    if timesteps and "timesteps" not in sampler.takes:
        raise ScheduleError(f"This scheduler takes no timesteps; those that do are {_taking('timesteps')}.")
    if sigmas and "sigmas" not in sampler.takes:
        raise ScheduleError(f"This scheduler takes no sigmas; those that do are {_taking('sigmas')}.")
    most = MOST_STEPS + 1 if sigmas else MOST_STEPS
    if (entries := len(timesteps or sigmas)) > most:
        raise ScheduleError(f"At most {most} entries are taken, {entries} are given.")
    _check_timesteps(timesteps, scheduler.config.num_train_timesteps - 1)
    _check_sigmas(sigmas)


def _check_timesteps(timesteps: Sequence[int], last: int) -> None:
    for each in timesteps:
        if not 0 <= each <= last:
            raise ScheduleError(f"Timesteps lie in 0 … {last}, {each} does not.")
    _check_falling("Timesteps", timesteps)


def _check_sigmas(sigmas: Sequence[float]) -> None:
    if len(sigmas) == 1:
        raise ScheduleError("Sigmas are one more than there are steps, so at least two; one is given.")
    for each in sigmas:
        if not (math.isfinite(each) and each >= 0):
            raise ScheduleError(f"Sigmas are finite numbers from 0 up, {each} is not.")
    _check_falling("Sigmas", sigmas)


def _check_falling(what: str, values: Sequence[float]) -> None:
    for one, other in pairwise(values):
        if not other < one:
            raise ScheduleError(f"{what} fall from one to the next; {other} after {one} does not.")


def _taking(word: Word) -> str:
    return _listed([name for name, sampler in SCHEDULERS.items() if word in sampler.takes])


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(names)
