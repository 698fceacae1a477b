"""`fal-ai/lora/image-to-image`: any Stable Diffusion checkpoint, with adapters of every kind."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from schemas.assets import AssetKind, Names
from schemas.errors import FieldError, InputError, Location
from schemas.fields import (
    ConfigUrl,
    ControlNetPath,
    EndpointInput,
    File,
    ImageSize,
    ImageUrl,
    InputPart,
    LoraWeight,
    PictureFile,
    Prompt,
    Seed,
    Url,
    Variant,
    check_work,
)
from schemas.settings import Limits

MAX_LORAS = 32
MAX_CONTROLS = 8  # of one kind
MAX_SCALES = 2**16  # characters
MAX_SCHEDULE = 151  # the last of 151 sigmas is where the 150th step leads

_SOURCE = Field(min_length=1, max_length=4096)
BasePath = Annotated[str, Names(AssetKind.BASE, variant="variant"), _SOURCE]
UnetPath = Annotated[str, Names(AssetKind.UNET, variant="variant"), _SOURCE]
EmbeddingPath = Annotated[str, Names(AssetKind.EMBEDDING), _SOURCE]
IpAdapterPath = Annotated[
    str, Names(AssetKind.IP_ADAPTER, folder="model_subfolder", file="weight_name"), _SOURCE
]
EncoderPath = Annotated[
    str,
    Names(AssetKind.IMAGE_ENCODER, folder="image_encoder_subfolder", file="image_encoder_weight_name"),
    _SOURCE,
]
IcLightPath = Annotated[str, Names(AssetKind.IC_LIGHT), _SOURCE]
FacePath = Annotated[str, Names(AssetKind.FACE_ANALYSIS), _SOURCE]
# A place inside a Hugging Face repository. No part of it is dots alone: it leads nowhere else.
_PART = r"[. ]*[A-Za-z0-9_+-][A-Za-z0-9_. +-]*"
Folder = Annotated[str, Field(pattern=rf"^(\./)?{_PART}(/{_PART})*/?$", max_length=256)]
FileName = Annotated[str, Field(pattern=rf"^{_PART}$", max_length=128)]

Scheduler = Literal[
    "DPM++ 2M",
    "DPM++ 2M Karras",
    "DPM++ 2M SDE",
    "DPM++ 2M SDE Karras",
    "Euler",
    "Euler A",
    "Euler (trailing timesteps)",
    "LCM",
    "LCM (trailing timesteps)",
    "DDIM",
    "TCD",
]


class Embedding(InputPart):
    """A textual inversion, and the words of the prompt that it stands for."""

    path: EmbeddingPath
    tokens: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field(
        ["<s0>", "<s1>"], min_length=1, max_length=100
    )


class ControlNet(InputPart):
    """A ControlNet and its control image, which is taken as it is."""

    path: ControlNetPath
    config_url: ConfigUrl | None = None
    variant: Variant | None = None
    image_url: ImageUrl
    mask_url: ImageUrl | None = Field(
        None, description="Where it is black the control does not act; of the control image's size."
    )
    conditioning_scale: float = Field(1, ge=0, le=2)
    start_percentage: float = Field(0, ge=0, le=1)
    end_percentage: float = Field(1, ge=0, le=1)
    ip_adapter_index: int | None = Field(
        None, ge=0, description="For InstantID: whose tokens the net reads in place of the text."
    )


def _count(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


_OneOrMany = Annotated[
    Annotated[Url, Tag("one")]
    | Annotated[list[Url], Field(min_length=1, max_length=MAX_CONTROLS), Tag("many")],
    Discriminator(_count),
    Names(AssetKind.IMAGE),
]


def _of_moderate_length(scales: dict[str, Any]) -> dict[str, Any]:
    """What it holds is looked at when the adapter is there; until then it is kept with the request."""
    if len(json.dumps(scales)) > MAX_SCALES:
        message = "The scales may have at most {max_length} characters as JSON"
        raise PydanticCustomError("too_long", message, {"max_length": MAX_SCALES})
    return scales


class IPAdapter(InputPart):
    """An IP-Adapter (arXiv 2308.06721): pictures in the place of words."""

    ip_adapter_image_url: _OneOrMany
    ip_adapter_mask_url: ImageUrl | None = Field(
        None, description="Where it is black the adapter does not act; of the adapter image's size."
    )
    path: IpAdapterPath
    model_subfolder: Folder | None = None
    weight_name: FileName | None = None
    insight_face_model_path: FacePath | None = None
    scale: float = Field(1, ge=0)
    scale_json: Annotated[dict[str, Any], AfterValidator(_of_moderate_length)] = Field(
        {}, max_length=100, description="Scales by block, as diffusers takes them; goes before scale."
    )
    unconditional_noising_factor: float = Field(0, ge=0, le=1)
    image_projection_shortcut: bool = Field(
        True, description="Of FaceID Plus: true for its second version, false for its first."
    )

    @property
    def images(self) -> list[str]:
        urls = self.ip_adapter_image_url
        return [urls] if isinstance(urls, str) else urls


class TimestepsInput(InputPart):
    """The timesteps to go through, falling; an empty array is none given."""

    method: Literal["default", "array"] = "default"
    array: list[int] = Field([], max_length=MAX_SCHEDULE)

    @property
    def given(self) -> list[int]:
        return self.array if self.method == "array" else []


class SigmasInput(InputPart):
    """The sigmas to go through, falling; an empty array is none given."""

    method: Literal["default", "array"] = "default"
    array: list[float] = Field([], max_length=MAX_SCHEDULE)

    @property
    def given(self) -> list[float]:
        return self.array if self.method == "array" else []


class Input(EndpointInput):
    """What a caller sends."""

    model_name: BasePath = Field(
        description="The base model: a Hugging Face repository, a URL, or a name of this server."
    )
    unet_name: UnetPath | None = Field(None, description="A U-Net in the place of the base model's own.")
    variant: Variant | None = Field(None, description="Which files of a repository: fp16 …")
    prompt: Prompt = Field(description="The prompt to generate an image from.")
    negative_prompt: Prompt = Field("", description="What the picture should not show.")
    prompt_weighting: bool = Field(
        False, description="Read (words:1.4) and the like as weights, and prompts of any length."
    )
    image_url: ImageUrl | None = Field(None, description="The picture to start from. Absent: from noise.")
    noise_strength: float = Field(
        0.5, ge=0, le=1, description="How much noise the start picture gets: 0 none, 1 nothing else."
    )
    loras: list[LoraWeight] = Field([], max_length=MAX_LORAS, description="LoRAs, added together.")
    embeddings: list[Embedding] = Field([], max_length=MAX_CONTROLS, description="Textual inversions.")
    controlnets: list[ControlNet] = Field([], max_length=MAX_CONTROLS, description="ControlNets, summed.")
    controlnet_guess_mode: bool = Field(
        False, description="Let ControlNets act on the prompted prediction only, less in the outer layers."
    )
    ip_adapter: list[IPAdapter] = Field([], max_length=MAX_CONTROLS, description="IP-Adapters.")
    image_encoder_path: EncoderPath | None = Field(None, description="The image encoder of the IP-Adapters.")
    image_encoder_subfolder: Folder | None = None
    image_encoder_weight_name: FileName = Field(
        "pytorch_model.bin", description="The encoder's file. For a .bin the .safetensors beside it is read."
    )
    ic_light_model_url: IcLightPath | None = Field(None, description="An IC-Light model, for SD 1.5.")
    ic_light_model_background_image_url: ImageUrl | None = Field(
        None, description="The background, for the IC-Light model that reads one."
    )
    ic_light_image_url: ImageUrl | None = Field(None, description="The picture to light anew.")
    seed: Seed | None = Field(None, description="The same seed and input give the same image.")
    num_inference_steps: int = Field(30, ge=1, le=150, description="The steps of a denoising.")
    guidance_scale: float = Field(
        7.5, ge=0, le=20, description="How closely the model sticks to the prompt; up to 1 is not at all."
    )
    clip_skip: int = Field(
        0, ge=0, le=2, description="How many of the text encoder's last layers are left out."
    )
    scheduler: Scheduler | None = Field(None, description="The sampler. Absent: the base model's own.")
    timesteps: TimestepsInput = Field(
        TimestepsInput(), description="Timesteps of one's own; not with sigmas."
    )
    sigmas: SigmasInput = Field(SigmasInput(), description="Sigmas of one's own; not with timesteps.")
    image_format: Literal["jpeg", "png"] = Field("png", description="The format of the pictures.")
    num_images: int = Field(1, ge=1, le=8, description="The number of images to generate.")
    enable_safety_checker: bool = Field(False, description="Blacken pictures that are not safe.")
    tile_width: int = Field(
        4096, ge=128, le=4096, description="Of the tiles that are denoised apart, in pixels."
    )
    tile_height: int = Field(4096, ge=128, le=4096, description="Of the tiles, in pixels.")
    tile_stride_width: int = Field(2048, ge=64, le=2048, description="From one tile to the next, in pixels.")
    tile_stride_height: int = Field(2048, ge=64, le=2048, description="From one tile to the next, in pixels.")
    eta: float = Field(0, ge=0, le=1, description="How much noise DDIM and TCD add at each step.")
    debug_latents: bool = Field(False, description="Also return what each step saw, as a tar of PNGs.")
    debug_per_pass_latents: bool = Field(False, description="The same for each tile.")

    def check(self, limits: Limits) -> None:
        if faults := [*self._faults()]:
            raise InputError(faults)

    @property
    def steps(self) -> int:
        """Of a denoising."""
        return len(self.timesteps.given) or len(self.sigmas.given) or self.num_inference_steps

    def check_work(self, size: ImageSize, limits: Limits) -> None:
        check_work(size, self.num_images, self.steps, limits)

    def _faults(self) -> Iterator[FieldError]:
        body: Location = ("body",)
        if self.timesteps.given and self.sigmas.given:
            yield FieldError((*body, "sigmas"), "cannot be set if timesteps is set", "value_error")
        if len(self.embeddings) > 1:
            message = f"at most one embedding is supported, got {len(self.embeddings)}"
            yield FieldError((*body, "embeddings"), message, "too_long", {"max_length": 1})
        for index, net in enumerate(self.controlnets):
            loc = (*body, "controlnets", index)
            if net.start_percentage >= net.end_percentage:
                end = net.end_percentage
                message = f"must be less than {end:g}, where it ends, got {net.start_percentage:g}"
                yield FieldError((*loc, "start_percentage"), message, "less_than", {"lt": end})
            if net.ip_adapter_index is not None and net.ip_adapter_index >= len(self.ip_adapter):
                count = len(self.ip_adapter)
                message = f"must be the number of an IP adapter, from 0; there are {count}"
                yield FieldError((*loc, "ip_adapter_index"), message, "less_than", {"lt": count})
        yield from self._ic_light_faults(body)
        if self.image_encoder_subfolder is not None and self.image_encoder_path is None:
            message = "needs image_encoder_path beside it"
            yield FieldError((*body, "image_encoder_subfolder"), message, "value_error")
        for index, adapter in enumerate(self.ip_adapter):
            if adapter.insight_face_model_path and len(adapter.images) != 1:
                message = f"an adapter of faces takes exactly one image, got {len(adapter.images)}"
                yield FieldError((*body, "ip_adapter", index, "ip_adapter_image_url"), message, "too_long")

    def _ic_light_faults(self, body: Location) -> Iterator[FieldError]:
        fields = ("ic_light_image_url", "ic_light_model_background_image_url")
        if self.ic_light_model_url is None:
            for field in fields:
                if getattr(self, field) is not None:
                    yield FieldError((*body, field), "needs ic_light_model_url beside it", "value_error")
        elif self.ic_light_image_url is None:
            message = "is needed beside ic_light_model_url: the picture to light anew"
            yield FieldError((*body, "ic_light_image_url"), message, "missing")


class Output(BaseModel):
    """What a caller gets."""

    images: list[PictureFile] = Field(description="The generated pictures.")
    seed: int = Field(description="The seed used: the one sent, or the one drawn.")
    has_nsfw_concepts: list[bool] = Field(description="Which pictures were found unsafe.")
    debug_latents: File | None = Field(None, description="What each step saw, if it was asked for.")
    debug_per_pass_latents: File | None = Field(None, description="The same for each tile.")


EXAMPLE: Final[dict[str, Any]] = {
    "model_name": "stabilityai/stable-diffusion-xl-base-1.0",
    "prompt": "Photo of a european medieval 40 year old queen, silver hair, highly detailed face, "
    "detailed eyes, head shot, intricate crown, age spots, wrinkles",
    "negative_prompt": "cartoon, painting, illustration, worst quality, low quality, normal quality",
    "prompt_weighting": True,
    "noise_strength": 0.5,
    "loras": [],
    "embeddings": [],
    "controlnets": [],
    "ip_adapter": [],
    "image_encoder_weight_name": "pytorch_model.bin",
    "num_inference_steps": 30,
    "guidance_scale": 7.5,
    "timesteps": {"method": "default", "array": []},
    "sigmas": {"method": "default", "array": []},
    "image_format": "jpeg",
    "num_images": 1,
    "tile_width": 4096,
    "tile_height": 4096,
    "tile_stride_width": 2048,
    "tile_stride_height": 2048,
}
