"""The one way out for pictures: finite, checked for safety, compressed. Nothing else compresses any."""

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL.Image import Image as Picture
from torch import Tensor

from pipelines import images
from pipelines.base import AnyPipeline, Generation, Glimpse
from pipelines.engine.sample import Sample
from schemas.settings import SafetyPolicy


class Checker(Protocol):
    """Such as SafetyChecker."""

    def flags(self, pictures: Sequence[Picture]) -> list[bool]: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """A picture that may be seen, and its file."""

    picture: Picture
    format: images.Format
    data: bytes


@dataclass(frozen=True, slots=True)
class Finished:
    """What a generation came to. `traces` are tars by the field of the answer."""

    pictures: tuple[Encoded, ...]
    flags: tuple[bool, ...]  # marks pictures found unsafe, which are black
    traces: dict[str, bytes]


class Exit:
    """Decodes, checks and compresses. Without a checker nothing is found unsafe.

    By the policy "always" the checker judges every picture; else where the request asks for it. Raises
    NotFinite where the model's numbers make no picture.
    """

    def __init__(self, checker: Checker | None, policy: SafetyPolicy) -> None:
        self._checker = checker
        self._always = policy == "always"

    def checks(self, generation: Generation) -> bool:
        """Whether the generation's pictures are judged."""
        return self._checker is not None and (self._always or generation.check_safety)

    @property
    def has_previews(self) -> bool:
        """Not where the operator has all pictures judged: the checker knows nothing of half-made ones."""
        return not self._always

    def finished(
        self, pipeline: AnyPipeline, generation: Generation, pixels: Mapping[Sample, Tensor] | None = None
    ) -> Finished:
        """The pictures, and those of their way: of what is unsafe in the end, the way is black too.

        Samples whose `pixels` are there already are not decoded.
        """
        known = pixels or {}
        drawn = [
            images.from_tensor(known[sample]) if sample in known else pipeline.finish(sample)
            for sample in generation.samples
        ]
        pictures, flags = self._judged(generation, drawn)
        traces = {
            field: _tar(self._judged_trace(generation, trace, flags))
            for field, trace in pipeline.traces(generation).items()
        }
        return Finished(_encoded(pictures, generation.format), flags, traces)

    def preview(self, pipeline: AnyPipeline, generation: Generation) -> Finished:
        """Small pictures of samples under way, judged as they are."""
        drawn = [pipeline.preview(sample) for sample in generation.samples]
        pictures, flags = self._judged(generation, drawn)
        return Finished(_encoded(pictures, "jpeg"), flags, {})

    def _judged(
        self, generation: Generation, pictures: Sequence[Picture]
    ) -> tuple[list[Picture], tuple[bool, ...]]:
        """The pictures, unsafe ones black, and which those are."""
        if self._checker is None or not self.checks(generation):
            return list(pictures), (False,) * len(pictures)
        flags = tuple(self._checker.flags(list(pictures)))
        shown = [images.blackened(each) if flag else each for each, flag in zip(pictures, flags, strict=True)]
        return shown, flags

    def _judged_trace(
        self, generation: Generation, trace: Iterable[Glimpse], flags: Sequence[bool]
    ) -> Iterator[tuple[str, Picture]]:
        """One at a time: there may be thousands."""
        for each in trace:
            if flags[each.image]:
                yield each.name, images.blackened(each.picture)
            else:
                [shown], _ = self._judged(generation, [each.picture])
                yield each.name, shown


def _encoded(pictures: Iterable[Picture], format: images.Format) -> tuple[Encoded, ...]:
    return tuple(Encoded(each, format, images.encode(each, format)) for each in pictures)


def _tar(named: Iterable[tuple[str, Picture]]) -> bytes:
    """Named pictures as PNGs in a tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, picture in named:
            encoded = images.encode(picture, "png")
            entry = tarfile.TarInfo(f"{name}.png")
            entry.size = len(encoded)
            tar.addfile(entry, io.BytesIO(encoded))
    return data.getvalue()
