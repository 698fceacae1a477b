"""The training loop: seeded by step, so that a run that is taken up again goes on as it would have."""

import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.zoo.training.muon import optimisers

Report = Callable[[str, int, int], None]  # what is trained, steps done, steps in all

_CHECKPOINT_S = 60.0
_EMA = 0.997


@dataclass(frozen=True, slots=True)
class Draw:
    """What a step may be random with. Equal steps draw equal numbers."""

    step: int
    share: float  # of the training, 0 … 1
    numpy: np.random.Generator
    torch: torch.Generator


@dataclass(frozen=True, slots=True)
class Job:
    """What `fit` trains: the parameters of `model`, for so many steps of `loss`."""

    name: str
    model: nn.Module
    loss: Callable[[Draw], Tensor]
    steps: int
    muon: float = 0.02
    adam: float = 2e-3
    warm_up: int = 50
    hold: float = 0.6  # of the steps, before the rate falls (cosine)
    clip: float = 1.0


def fit(
    job: Job, folder: Path, report: Report, device: str = "cpu", checkpoint_s: float = _CHECKPOINT_S
) -> nn.Module:
    """The trained model's moving average, in evaluation mode.

    Checkpoints go to `folder`/NAME.pt every `checkpoint_s` and at the end; a run that finds one goes on
    from it. Losses are appended to NAME.csv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{job.name}.pt"
    model = job.model.to(device).train()
    average = deepcopy(model).eval().requires_grad_(False)
    rules = optimisers(model, job.muon, job.adam)
    rates = [group["lr"] for rule in rules for group in rule.param_groups]
    first = 0
    if file.exists():
        known = torch.load(file, map_location=device, weights_only=True)
        first = known["step"]
        model.load_state_dict(known["model"])
        average.load_state_dict(known["average"])
        for rule, state in zip(rules, known["rules"], strict=True):
            rule.load_state_dict(state)

    def save(step: int) -> None:
        states = {
            "step": step,
            "model": model.state_dict(),
            "average": average.state_dict(),
            "rules": [rule.state_dict() for rule in rules],
        }
        torch.save(states, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    saved, losses = time.monotonic(), []
    for step in range(first, job.steps):
        for rate, group in zip(rates, (g for rule in rules for g in rule.param_groups), strict=True):
            group["lr"] = rate * _rate(step, job)
        loss = job.loss(_draw(job, step, device))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        for rule in rules:
            rule.step()
            rule.zero_grad()
        _follow(average, model, min(_EMA, (1 + step) / (10 + step)))
        losses.append(loss.item())
        report(job.name, step + 1, job.steps)
        if step % 20 == 19:
            with file.with_suffix(".csv").open("a") as curve:
                curve.write(f"{step + 1},{np.mean(losses):.5f},{time.process_time():.0f}\n")
            losses.clear()
        if time.monotonic() - saved > checkpoint_s:
            save(step + 1)
            saved = time.monotonic()
    if first < job.steps:
        save(job.steps)
    return average


def _rate(step: int, job: Job) -> float:
    if step < job.warm_up:
        return (step + 1) / job.warm_up
    left = (step / job.steps - job.hold) / (1 - job.hold)
    return 1.0 if left < 0 else 0.02 + 0.98 * (1 + math.cos(math.pi * left)) / 2


def _draw(job: Job, step: int, device: str) -> Draw:
    seed = sum(map(ord, job.name)) * 1_000_003 + step
    return Draw(
        step,
        step / job.steps,
        np.random.default_rng(seed),
        torch.Generator(device).manual_seed(seed),
    )


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, keep: float) -> None:
    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(now, 1 - keep)
