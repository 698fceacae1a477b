"""Where the weights that requests name come from, and what they may cost."""

from typing import Annotated

from pydantic import Field

from schemas.settings.base import MAX_IMAGE_BYTES, ReachSettings, Settings

# The methods that fal names, in the files of https://huggingface.co/Xiaojiu-Z/EasyControl
_METHODS = ("canny", "depth", "hedsketch", "inpainting", "pose", "seg", "subject")
EASYCONTROLS = {
    **{name: f"Xiaojiu-Z/EasyControl/models/{name}.safetensors" for name in _METHODS},
    "ghibli": "Xiaojiu-Z/EasyControl/models/Ghibli.safetensors",
}


class FetchSettings(ReachSettings):
    """What a URL in a request may reach, and how much it may cost."""

    max_redirects: int = Field(3, ge=0)
    image_timeout_s: float = Field(60, gt=0, description="a whole image")
    weights_timeout_s: float = Field(1800, gt=0, description="a whole weights file")
    max_image_bytes: int = Field(MAX_IMAGE_BYTES, gt=0)
    max_weights_bytes: int = Field(8 * 2**30, gt=0)
    max_config_bytes: int = Field(64 * 2**10, gt=0, description="of a ControlNet's config.json")


class WeightSettings(Settings):
    """Where adapter weights named in requests come from, and where they are kept."""

    cache: str = Field("file://~/.cache/darkroom/weights", description="a folder on a local disk")
    cache_bytes: int = Field(50 * 2**30, gt=0, description="files unused for longest go first")
    hub: bool = Field(True, description="whether a request may name a Hugging Face repository")
    hub_url: str = "https://huggingface.co"
    easycontrols: dict[str, str] = Field(
        EASYCONTROLS, description="EasyControl's built-in methods: name → file, URL or Hub id"
    )
    names: dict[str, str] = Field(
        default_factory=dict, description="server-local names: name → file, URL or Hub id"
    )


class BaseSettings(Settings):
    """The base models, and UNets in their place, that requests may name, for endpoints that let them.

    Names of your own, and the model of the start, always may be named. `allow` is compared with the very
    text that the request gives. A file that a caller has uploaded to this server counts as of no site: it
    is taken only where `allow` has a plain "*".
    """

    names: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict,
        description="names of your own: name → zoo:NAME, a local folder or file, a URL or a Hub id; "
        "what is local is used where it lies",
    )
    allow: tuple[str, ...] = Field(
        ("*",),
        description="which other Hub ids and URLs may be named, * standing for anything: "
        "stabilityai/*, https://models.example/*; none: names only",
    )
    max_bytes: int = Field(30 * 2**30, gt=0, description="a whole model as it is downloaded")
    memory_bytes: int = Field(
        24 * 2**30, gt=0, description="memory of the device for base models, the one at the start included"
    )
