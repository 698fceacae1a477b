"""What can be told of an endpoint by its schema: its names, its category, when it last changed."""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from pipelines.registry import Endpoint
from schemas.assets import takes_image

# How people write what an id has in small letters.
_SPELLED = {
    "controlnet": "ControlNet",
    "flux": "FLUX",
    "lora": "LoRA",
    "rf": "RF",
    "sdxl": "SDXL",
    "to": "to",
}


@dataclass(frozen=True, slots=True)
class Description:
    """An endpoint in words."""

    id: str
    display_name: str
    category: str  # fal's word: text-to-image, image-to-image
    description: str
    updated_at: str  # ISO 8601


@cache
def describe(endpoint: Endpoint) -> Description:
    """By its id, the first line of its schema's docstring, and the fields of its Input."""
    schema = endpoint.schema()
    line = (schema.__doc__ or "").strip().partition("\n")[0]
    sentence = line.removeprefix(f"`{endpoint.id}`:").strip()
    changed = Path(schema.__file__ or "").stat().st_mtime
    return Description(
        endpoint.id,
        " ".join(_SPELLED.get(word, word.capitalize()) for word in endpoint.stem.split("_")),
        "image-to-image" if takes_image(endpoint.input_type()) else "text-to-image",
        sentence[:1].upper() + sentence[1:],
        datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds"),
    )


def type_name(endpoint: Endpoint) -> str:
    """The stem of the names of an endpoint's types: `FluxDev` of FluxDevInput."""
    return "".join(part.capitalize() for part in endpoint.stem.split("_"))
