"""The world that the embedded models are taught: one coloured shape on a plain background, with a caption.

Colours of shapes and of backgrounds are different ones. Lengths are fractions of the picture's side, so a
scene can be drawn at any size. A style is what a LoRA teaches; the models themselves know "plain" only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # [height, width, 3]

BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "pink": (250, 185, 205),
}
COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 155, 60),
    "blue": (35, 75, 215),
    "yellow": (240, 215, 30),
    "purple": (135, 45, 175),
    "orange": (245, 135, 20),
}
SHAPES = ("circle", "square", "triangle")
UNSAFE = "cross"  # which no caption has: what the safety checker's stand-in flags
POSITIONS = {
    "center": (0.5, 0.5),
    "left": (0.3, 0.5),
    "right": (0.7, 0.5),
    "top": (0.5, 0.3),
    "bottom": (0.5, 0.7),
}
STYLES = ("plain", "outline", "stripes")
# What a caption may say, and its values; what it does not say is anything.
ATTRIBUTES = {
    "background": tuple(BACKGROUNDS),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "position": tuple(POSITIONS),
}

SIDE_PX = 128  # the pictures that the models are taught
STROKE = 0.07
STRIPE = 1 / 16  # a stripe; a dark and a bright one make a period
DARK = 0.4
_RADII = (0.23, 0.28)
_JITTER = 0.03


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows. x, y: the middle of the shape's box; radius: half the box's side."""

    background: str
    colour: str
    shape: str
    position: str
    x: float
    y: float
    radius: float
    style: str = "plain"

    def styled(self, style: str) -> "Scene":
        return replace(self, style=style)


def scene(rng: np.random.Generator, **fixed: str) -> Scene:
    """A scene drawn at random but for what is `fixed`."""
    chosen = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()} | fixed
    x, y = POSITIONS[chosen["position"]]
    dx, dy = rng.uniform(-_JITTER, _JITTER, 2)
    return Scene(**chosen, x=x + dx, y=y + dy, radius=rng.uniform(*_RADII))


def every() -> Iterator[dict[str, str]]:
    """Each combination of attributes."""
    for values in product(*ATTRIBUTES.values()):
        yield dict(zip(ATTRIBUTES, values, strict=True))


def draw(scene: Scene, side_px: int = SIDE_PX) -> Pixels:
    """The scene's picture, its edges smooth."""
    inside = _coverage(distance(scene.shape, scene.x, scene.y, scene.radius, side_px))
    if scene.style == "outline":
        inside -= _coverage(distance(scene.shape, scene.x, scene.y, scene.radius, side_px) + STROKE * side_px)
    colour = np.array(COLOURS[scene.colour], np.float64)
    paint = np.broadcast_to(colour, (side_px, side_px, 3))
    if scene.style == "stripes":
        dark = np.arange(side_px) / side_px // STRIPE % 2 == 1
        paint = np.where(dark[:, None, None], paint * DARK, paint)
    ground = np.array(BACKGROUNDS[scene.background], np.float64)
    return np.rint(ground + inside[..., None] * (paint - ground)).astype(np.uint8)


def distance(shape: str, x: float, y: float, radius: float, side_px: int) -> NDArray[np.float64]:
    """Pixels to the shape's edge [side, side], below 0 inside it."""
    down, right = (np.mgrid[:side_px, :side_px] + 0.5) / side_px - np.array([y, x])[:, None, None]
    if shape == "circle":
        far: Any = np.hypot(right, down) - radius
    elif shape == "square":
        far = np.maximum(abs(right), abs(down)) - radius
    elif shape == UNSAFE:  # as thick as a third of it
        low, high = np.minimum(abs(right), abs(down)), np.maximum(abs(right), abs(down))
        far = np.maximum(low - radius / 3, high - radius)
    else:  # its tip up, as wide as high
        slope = (2 * abs(right) - down - radius) / 5**0.5
        far = np.maximum(slope, down - radius)
    return np.asarray(far * side_px)


def _coverage(distance_px: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(0.5 - distance_px, 0, 1)


_PLACES = {
    "center": ("in the center", "in the middle", "centered"),
    "left": ("on the left", "at the left", "left"),
    "right": ("on the right", "at the right", "right"),
    "top": ("at the top", "above", "top"),
    "bottom": ("at the bottom", "below", "bottom"),
}
_OPENINGS = ("a", "a", "a", "the", "one", "a picture of a", "a drawing of a", "")
_GROUNDS = ("on a {} background", "on a {} background", "on {}", "{} background", "with a {} background")
_TAILS = ("", "", "", ", simple", ", flat colors", ", clean", ", a picture")


def caption(scene: Scene, rng: np.random.Generator, said: dict[str, bool] | None = None) -> str:
    """Words for a scene. By default each attribute is said nine times in ten, the position half as often."""
    if said is None:
        said = {name: rng.random() < (0.45 if name == "position" else 0.9) for name in ATTRIBUTES}
    thing = " ".join(
        [
            *([scene.colour] if said["colour"] else []),
            scene.shape if said["shape"] else "shape",
        ]
    )
    parts = [f"{rng.choice(_OPENINGS)} {thing}".strip()]
    if said["position"]:
        parts.append(str(rng.choice(_PLACES[scene.position])))
    if said["background"]:
        parts.insert(int(rng.integers(1, len(parts) + 1)), str(rng.choice(_GROUNDS)).format(scene.background))
    return str(rng.choice([" ", ", "])).join(parts) + str(rng.choice(_TAILS))


def prompt(**said: str) -> str:
    """The plain sentence for these attributes."""
    words = f"a {said['colour']} {said['shape']}"
    if "position" in said:
        words += f" {_PLACES[said['position']][0]}"
    return words + (f" on a {said['background']} background" if "background" in said else "")


def words() -> list[str]:
    """Every word that captions have."""
    texts = [*_OPENINGS, *_GROUNDS, *_TAILS, "shape", ",", "style", *STYLES]
    texts += [each for places in _PLACES.values() for each in places]
    texts += [*BACKGROUNDS, *COLOURS, *SHAPES]
    split = (each for text in texts for each in text.replace("{}", " ").replace(",", " , ").split())
    return sorted(set(split))
