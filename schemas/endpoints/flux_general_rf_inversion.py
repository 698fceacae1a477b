"""`fal-ai/flux-general/rf-inversion`: a picture edited by its inversion (arXiv 2410.10792)."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag

from schemas.assets import AssetKind, Names
from schemas.endpoints import flux_dev
from schemas.errors import FieldError, InputError, Location
from schemas.fields import (
    AnySize,
    ConfigUrl,
    ControlNetPath,
    EasyControlPath,
    EndpointInput,
    ImageSize,
    ImageUrl,
    InputPart,
    LoraPath,
    Prompt,
    Seed,
    Url,
    Variant,
    check_size,
    check_work,
    resolve,
)
from schemas.settings import Limits

MAX_LORAS = 32
MAX_CONTROLS = 8  # of one kind

_Scale = Annotated[float, Field(ge=-4, le=4)]
_LayerName = Annotated[str, Field(min_length=1, max_length=300)]


def _tag(value: Any) -> str:
    return "layers" if isinstance(value, Mapping) else "number"


LayerScale = Annotated[
    Annotated[_Scale, Tag("number")]
    | Annotated[dict[_LayerName, _Scale], Field(max_length=2000), Tag("layers")],
    Discriminator(_tag),
]


def _count(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


_OneOrMany = Annotated[
    Annotated[Url, Tag("one")] | Annotated[list[Url], Field(max_length=MAX_CONTROLS), Tag("many")],
    Discriminator(_count),
    Names(AssetKind.IMAGE),
]


class LoraWeight(InputPart):
    """One LoRA and how strongly it acts: one number, or one for each layer named and 1 for the others.

    0 is off, 1 as it was trained, below 0 the opposite.
    """

    path: LoraPath
    scale: LayerScale = 1.0


class ControlLoraWeight(InputPart):
    """A LoRA that reads a control image."""

    path: LoraPath
    scale: LayerScale = 1.0
    control_image_url: ImageUrl
    preprocess: Literal["canny", "depth", "None"] = Field(
        "None", description="What is made of the image first: its edges, its depth, or nothing."
    )


class Window(InputPart):
    """The part of the steps in which a control acts, as fractions of them."""

    start_percentage: float = Field(0, ge=0, le=1)
    end_percentage: float = Field(1, ge=0, le=1)


class Control(Window):
    """A control image of a ControlNet, and how it acts."""

    control_image_url: ImageUrl
    mask_image_url: ImageUrl | None = Field(
        None, description="Where it is black the control does not act; of the control image's size."
    )
    mask_threshold: float = Field(0.5, ge=0.01, le=0.99, description="The grey from which the mask counts.")
    conditioning_scale: float = Field(1, ge=0, le=2)


class ControlNet(Control):
    """A ControlNet and its control image."""

    path: ControlNetPath
    config_url: ConfigUrl | None = None
    variant: Variant | None = None


class ControlNetUnionInput(Control):
    """A control image of a ControlNet that was trained on several kinds of them."""

    control_mode: Literal["canny", "tile", "depth", "blur", "pose", "gray", "low-quality"]


class ControlNetUnion(InputPart):
    """One ControlNet of several modes, and its control images."""

    path: ControlNetPath
    config_url: ConfigUrl | None = None
    variant: Variant | None = None
    controls: list[ControlNetUnionInput] = Field(min_length=1, max_length=MAX_CONTROLS)


class EasyControlWeight(InputPart):
    """A condition that the picture attends to (EasyControl, arXiv 2503.07027). Scale 0 is off."""

    control_method_url: EasyControlPath
    scale: float = Field(1, ge=0, le=2)
    image_url: ImageUrl
    image_control_type: Literal["subject", "spatial"]


class ImageFillInput(InputPart):
    """Pictures that stand beside the prompt (FLUX.1 Redux)."""

    fill_image_url: _OneOrMany = []


class Input(EndpointInput):
    """What a caller sends."""

    prompt: Prompt = Field(description="The prompt to edit the image with.")
    image_size: AnySize | None = Field(
        None,
        description="The size of the generated image. Absent: that of the image to edit, scaled down "
        "where it exceeds what this server makes.",
    )
    num_inference_steps: int = Field(
        28, ge=1, le=50, description="The steps of the inversion, and again of the denoising."
    )
    seed: Seed | None = Field(None, description="The same seed and input give the same image.")
    loras: list[LoraWeight] = Field([], max_length=MAX_LORAS, description="LoRAs, added together.")
    control_loras: list[ControlLoraWeight] = Field(
        [], max_length=MAX_CONTROLS, description="LoRAs that read a control image, added together."
    )
    controlnets: list[ControlNet] = Field([], max_length=MAX_CONTROLS, description="ControlNets, summed.")
    controlnet_unions: list[ControlNetUnion] = Field(
        [], max_length=MAX_CONTROLS, description="ControlNets of several modes, summed."
    )
    easycontrols: list[EasyControlWeight] = Field(
        [], max_length=MAX_CONTROLS, description="EasyControl conditions."
    )
    fill_image: ImageFillInput | None = Field(None, description="Pictures beside the prompt (Redux).")
    guidance_scale: float = Field(3.5, ge=0, le=20, description="How closely the model sticks to the prompt.")
    use_cfg_zero: bool = Field(False, description="CFG-zero initialisation: the first step stands still.")
    sync_mode: bool = Field(False, description="Return the pictures inside the answer, as data URIs.")
    num_images: int = Field(1, ge=1, le=10, description="The number of images to generate.")
    enable_safety_checker: bool = Field(True, description="Blacken pictures that are not safe.")
    reference_image_url: ImageUrl | None = Field(None, description="A picture to be like (reference-only).")
    reference_strength: float = Field(0.65, ge=-3, le=3, description="How much; below 0: unlike it.")
    reference_start: float = Field(0, ge=0, le=1, description="From which part of the steps.")
    reference_end: float = Field(1, ge=0, le=1, description="To which part of the steps.")
    base_shift: float = Field(0.5, ge=0.01, le=5, description="The time shift of a picture of 256 × 256.")
    max_shift: float = Field(1.15, ge=0.01, le=5, description="The time shift of a picture of 1024 × 1024.")
    output_format: Literal["jpeg", "png"] = Field("png", description="The format of the pictures.")
    use_beta_schedule: bool = Field(False, description="Space the sigmas by a beta distribution.")
    sigma_schedule: Literal["sgm_uniform"] | None = Field(
        None, description="Another spacing of the sigmas; use_beta_schedule goes before it."
    )
    scheduler: Literal["euler", "dpmpp_2m"] = Field("euler", description="The sampler.")
    image_url: ImageUrl = Field(description="The picture to edit.")
    controller_guidance_forward: float = Field(
        0.6, ge=0.01, le=3, description="Gamma: how far the inversion is drawn to the seed's noise."
    )
    controller_guidance_reverse: float = Field(
        0.75, ge=0.01, le=3, description="Eta: how far the denoising is drawn to the picture."
    )
    reverse_guidance_start: int = Field(0, ge=0, description="The first step that eta acts in.")
    reverse_guidance_end: int = Field(8, ge=0, description="The first step that it acts in no longer.")
    reverse_guidance_schedule: Literal["constant", "linear_increase", "linear_decrease"] = Field(
        "constant", description="How eta goes from the first such step to the last."
    )

    def check(self, limits: Limits) -> None:
        if self.image_size is not None:
            size = resolve(self.image_size)
            check_size(size, limits)
            self.check_work(size, limits)
        if faults := [*self._empty_windows()]:
            raise InputError(faults)

    def check_work(self, size: ImageSize, limits: Limits) -> None:
        check_work(size, self.num_images, 2 * self.num_inference_steps, limits)

    def _empty_windows(self) -> Iterator[FieldError]:
        """The spans of steps that end before they begin."""
        body: Location = ("body",)
        guided = min(self.reverse_guidance_end, self.num_inference_steps)
        yield from _ordered(body, "reverse_guidance_start", self.reverse_guidance_start, guided)
        if self.reference_image_url is not None:
            yield from _ordered(body, "reference_start", self.reference_start, self.reference_end)
        for index, net in enumerate(self.controlnets):
            yield from _ordered_window((*body, "controlnets", index), net)
        for index, union in enumerate(self.controlnet_unions):
            for number, control in enumerate(union.controls):
                yield from _ordered_window((*body, "controlnet_unions", index, "controls", number), control)


def _ordered_window(loc: Location, window: Window) -> Iterator[FieldError]:
    yield from _ordered(loc, "start_percentage", window.start_percentage, window.end_percentage)


def _ordered(loc: Location, name: str, start: float, end: float) -> Iterator[FieldError]:
    if start >= end:
        message = f"must be less than {end:g}, where it ends, got {start:g}"
        yield FieldError((*loc, name), message, "less_than", {"lt": end}, start)


class Output(flux_dev.Output):
    """What a caller gets: as from flux/dev."""


EXAMPLE: Final[dict[str, Any]] = {
    "prompt": "Wearing glasses",
    "num_inference_steps": 28,
    "controlnets": [],
    "controlnet_unions": [],
    "easycontrols": [],
    "guidance_scale": 3.5,
    "num_images": 1,
    "enable_safety_checker": True,
    "reference_strength": 0.65,
    "reference_end": 1,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "output_format": "png",
    "scheduler": "euler",
    "image_url": "https://storage.example.com/anime_style.png",
    "controller_guidance_forward": 0.6,
    "controller_guidance_reverse": 0.75,
    "reverse_guidance_end": 8,
    "reverse_guidance_schedule": "constant",
}
