"""Judges: what a picture of the world shows, told from its pixels alone, without any model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipelines.zoo.world import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, STRIPE, Pixels, distance

Mask = NDArray[np.bool_]

_APART = 48  # of 255, by which a shape differs from its background
_THIN = 0.1  # of the side, from the middle to the edge: strokes are thinner, filled shapes thicker
_LEAST = 0.02  # of the picture, which a shape takes
# Of a shape's box: its area, and how far its centre of mass lies below the middle, in radii.
_AREAS = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}
_SINKS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a picture shows; None where there is no shape."""

    background: str
    colour: str | None = None
    shape: str | None = None
    position: str | None = None
    style: str | None = None


def look(picture: Pixels) -> Seen:
    """Judge a square picture [side, side, 3]."""
    seen = picture.astype(np.float64)
    ground = _ground(seen)
    background = _nearest(ground, BACKGROUNDS)
    marks = np.linalg.norm(seen - ground, axis=2) > _APART
    if marks.mean() < _LEAST:
        return Seen(background)
    solid = _largest(ndimage.binary_fill_holes(marks))
    shape, x, y, radius = _fit(solid)
    side = len(picture)
    depth = distance(shape, x, y, radius, side)
    core = depth < 0.5 * depth.min()
    light = seen.mean(axis=2)
    own = marks & solid
    inner = ndimage.distance_transform_edt(own)
    inner = inner >= 0.5 * inner.max()  # where the background does not shine through
    bright = inner & (light >= np.quantile(light[inner], 0.7))  # of stripes, the ones that are not darkened
    return Seen(
        background,
        _nearest(np.median(seen[bright], axis=0), COLOURS),
        shape,
        min(POSITIONS, key=lambda name: np.hypot(x - POSITIONS[name][0], y - POSITIONS[name][1])),
        _style(light, own, core),
    )


def mask(picture: Pixels) -> Mask:
    """Where a picture differs from its background."""
    seen = picture.astype(np.float64)
    return np.asarray(np.linalg.norm(seen - _ground(seen), axis=2) > _APART)


def edge_iou(one: Pixels, other: Pixels, reach_px: int = 2) -> float:
    """How far the outlines of two pictures agree, 0 … 1: overlap over union, each widened by `reach_px`."""
    first, second = (
        ndimage.binary_dilation(_outline(mask(each)), iterations=reach_px) for each in (one, other)
    )
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 0.0


def _outline(area: Mask) -> Mask:
    return np.asarray(area & ~ndimage.binary_erosion(area))


def _ground(seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """The background's colour: the median along the border."""
    width = max(1, len(seen) // 32)
    edges = (seen[:width], seen[-width:], seen[:, :width], seen[:, -width:])
    return np.asarray(np.median(np.concatenate([each.reshape(-1, 3) for each in edges]), axis=0))


def _nearest(colour: NDArray[np.float64], names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - names[name])))


def _largest(area: Mask) -> Mask:
    labels, count = ndimage.label(area)
    if count < 2:
        return area
    sizes = np.bincount(labels.ravel())[1:]
    return np.asarray(labels == 1 + sizes.argmax())


def _fit(solid: Mask) -> tuple[str, float, float, float]:
    """The shape that covers an area best, with its middle and radius. All shapes fit by area and centre."""
    side = len(solid)
    y, x = ((each + 0.5) / side for each in ndimage.center_of_mass(solid))
    found = []
    for shape in SHAPES:
        radius = float((solid.mean() / _AREAS[shape]) ** 0.5 / 2)
        middle = y - _SINKS[shape] * radius
        cover = distance(shape, x, middle, radius, side) < 0
        overlap = (cover & solid).sum() / (cover | solid).sum()
        found.append((overlap, shape, x, middle, radius))
    return max(found)[1:]


def _style(light: NDArray[np.float64], own: Mask, core: Mask) -> str:
    """An outline where nothing is thick; stripes where the core's light goes up and down by rows."""
    thin = ndimage.distance_transform_edt(own).max() < _THIN * len(light)
    if _swing(light, core) > (0.6 if thin else 0.2):  # dark stripes may be lost on a dark background
        return "stripes"
    return "outline" if thin else "plain"


def _swing(light: NDArray[np.float64], core: Mask) -> float:
    """How far the rows' light swings with the stripes' period, as a share of its mean."""
    rows = core.any(axis=1)
    profile = (light * core).sum(axis=1)[rows] / core.sum(axis=1)[rows]
    wave = np.exp(2j * np.pi * np.arange(len(profile)) / (2 * STRIPE * len(light)))
    return float(2 * abs(((profile - profile.mean()) * wave).mean()) / profile.mean())


def agreement(pictures: Sequence[Pixels], asked: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """The share of pictures, 0 … 1, that show what was asked, by attribute."""
    seen = [look(picture) for picture in pictures]
    names = dict.fromkeys(name for each in asked for name in each)
    return {
        name: float(
            np.mean(
                [
                    getattr(one, name) == each[name]
                    for one, each in zip(seen, asked, strict=True)
                    if name in each
                ]
            )
        )
        for name in names
    }
