"""What a replica does before its first request: room, weights, the pace of its device."""

import logging
import time
from collections.abc import Mapping

import torch

from pipelines import pacing, registry, sources
from pipelines.base import AnyPipeline, Model
from pipelines.engine.pace import Pace
from pipelines.placement import placed
from pipelines.safety import SafetyChecker
from schemas.settings import ModelSettings

logger = logging.getLogger(__name__)


def bound_gpu_memory(settings: ModelSettings) -> None:
    """Ray's fraction is only bookkeeping; this makes torch keep to it."""
    if settings.device.startswith("cuda") and 0 < settings.num_gpus < 1:
        torch.cuda.set_per_process_memory_fraction(settings.num_gpus)


def gpu_memory(settings: ModelSettings) -> dict[str, int]:
    """In bytes; `limit` is what the replica may have."""
    _, total = torch.cuda.mem_get_info(settings.device)
    return {
        "allocated": torch.cuda.memory_allocated(settings.device),
        "reserved": torch.cuda.memory_reserved(settings.device),
        "limit": int(total * min(settings.num_gpus or 1.0, 1.0)),
    }


def check_room(settings: ModelSettings) -> None:
    """Log what the model will take. Raises NoRoom where that is more than it has."""
    card = None
    if settings.device.startswith("cuda"):
        card = torch.cuda.get_device_properties(settings.device).total_memory
    placement = placed(settings, sources.locate, card)
    logger.info("%s", "\n".join(placement.lines()))
    placement.check()


def load(settings: ModelSettings) -> tuple[Mapping[str, AnyPipeline], Model]:
    """The resident model, and a pipeline on it for each endpoint."""
    endpoints = [registry.endpoint(endpoint_id) for endpoint_id in settings.endpoints]
    kinds: dict[str, type[AnyPipeline]] = {each.id: each.pipeline().Pipeline for each in endpoints}
    families = {each.family for each in endpoints}
    if len(families) != 1:
        raise ValueError(f"one model cannot serve several families: {sorted(families)}")
    started = time.monotonic()
    model = next(iter(kinds.values())).model_type.load(settings, sources.locate)
    logger.info("loaded %s in %.1f s", settings.model, time.monotonic() - started)
    model.warm()
    return {endpoint_id: kind(model) for endpoint_id, kind in kinds.items()}, model


def measured_pace(settings: ModelSettings, pipelines: Mapping[str, AnyPipeline], model: Model) -> Pace:
    """How many rows gain: as the settings say, or as this device shows."""
    if settings.batch_rows is not None or settings.device == "cpu":
        return Pace(rows=settings.batch_rows)
    endpoint_id, pipeline = next(iter(pipelines.items()))
    started = time.monotonic()
    with pacing.probes(pipeline, registry.endpoint(endpoint_id).schema(), settings) as samples:
        pace = pacing.measured(model.predict, samples, settings.batch_tokens)
    for curve in pace.curves:
        took = ", ".join(f"{rows}: {seconds * 1000:.1f} ms" for rows, seconds in curve.seconds.items())
        logger.info("rows of %d image tokens: %s; %d gain", curve.cost, took, curve.rows)
    logger.info("measured the pace of %s in %.1f s", settings.model, time.monotonic() - started)
    return pace


def load_safety_checker(settings: ModelSettings) -> SafetyChecker | None:
    if settings.safety_checker is None:
        return None
    return SafetyChecker.load(sources.locate(settings.safety_checker), settings.device)
