"""Field types that endpoints share, with their bounds and units."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from schemas.assets import AssetKind, Names
from schemas.errors import FieldError, InputError
from schemas.settings import Limits

MAX_URL = 8192  # characters; no store's signed URL is as long


def _no_longer_than_urls(text: str) -> str:
    """A data URI is as long as its file; what else names a picture is kept with the request as it is."""
    if len(text) > MAX_URL and text[:5].lower() != "data:":
        message = "A URL may have at most {max_length} characters"
        raise PydanticCustomError("string_too_long", message, {"max_length": MAX_URL})
    return text


Prompt = Annotated[str, Field(max_length=32_768)]
Url = Annotated[str, Field(min_length=1), AfterValidator(_no_longer_than_urls)]
ImageUrl = Annotated[
    Url,
    Names(AssetKind.IMAGE),
    Field(description="An http or https URL, a data URI, or a file of this server."),
]
_SOURCE = Field(
    min_length=1,
    max_length=4096,
    description="A URL, a Hugging Face repository with or without a file, or a name of this server.",
)
LoraPath = Annotated[str, Names(AssetKind.LORA), _SOURCE]
ControlNetPath = Annotated[str, Names(AssetKind.CONTROLNET, variant="variant"), _SOURCE]
EasyControlPath = Annotated[
    str,
    Names(AssetKind.EASYCONTROL),
    Field(min_length=1, max_length=4096, description="A URL, or the name of a built-in method."),
]
ConfigUrl = Annotated[
    str,
    Names(AssetKind.CONFIG),
    Field(min_length=1, max_length=4096, description="The URL of a config.json."),
]
# The file of a Hugging Face repository that ends in `.VARIANT.safetensors`.
Variant = Annotated[str, Field(pattern=r"^[\w-]{1,32}$", description="Of a Hugging Face repository: fp16 …")]
# torch takes any 64-bit seed; the sign is kept, so that the seed in the answer is the one sent.
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class ImageSize(BaseModel):
    """A custom size in pixels. Models round it down to their own grid and report what they made."""

    model_config = ConfigDict(frozen=True)

    width: int = Field(512, gt=0, le=14142, description="The width of the generated image.")
    height: int = Field(512, gt=0, le=14142, description="The height of the generated image.")


class ImageSizePreset(StrEnum):
    """fal.ai's named sizes."""

    square_hd = "square_hd"
    square = "square"
    portrait_4_3 = "portrait_4_3"
    portrait_16_9 = "portrait_16_9"
    landscape_4_3 = "landscape_4_3"
    landscape_16_9 = "landscape_16_9"


def _tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "preset"
    return "custom" if isinstance(value, Mapping | ImageSize) else None


AnySize = Annotated[
    Annotated[ImageSize, Tag("custom")] | Annotated[ImageSizePreset, Tag("preset")],
    Discriminator(
        _tag,
        custom_error_type="image_size",
        custom_error_message="Give the name of a size, or an object with width and height",
    ),
]

PRESETS: Mapping[ImageSizePreset, ImageSize] = {
    ImageSizePreset.square_hd: ImageSize(width=1024, height=1024),
    ImageSizePreset.square: ImageSize(width=512, height=512),
    ImageSizePreset.portrait_4_3: ImageSize(width=768, height=1024),
    ImageSizePreset.portrait_16_9: ImageSize(width=576, height=1024),
    ImageSizePreset.landscape_4_3: ImageSize(width=1024, height=768),
    ImageSizePreset.landscape_16_9: ImageSize(width=1024, height=576),
}


def resolve(size: ImageSize | ImageSizePreset) -> ImageSize:
    """The pixels that a preset or a custom size asks for."""
    return PRESETS[size] if isinstance(size, ImageSizePreset) else size


def check_size(size: ImageSize, limits: Limits) -> None:
    """Raise InputError when the picture has more pixels than this server makes."""
    pixels = size.width * size.height
    if pixels <= limits.max_pixels:
        return
    raise InputError(
        [
            FieldError(
                ("body", "image_size"),
                f"width × height must be at most {limits.max_pixels} pixels, "
                f"got {size.width} × {size.height} = {pixels}; ask for a smaller size",
                "less_than_equal",
                {"le": limits.max_pixels},
            )
        ]
    )


def check_work(size: ImageSize, images: int, steps: int, limits: Limits) -> None:
    """Raise InputError when so many pictures of this size, in so many steps, are too much for one request."""
    megapixels = size.width * size.height / 1e6
    work, most = megapixels * images * steps, limits.max_megapixel_steps
    if work <= most:
        return
    field = "num_images" if images > 1 else "num_inference_steps"
    message = (
        f"{images} × {size.width} × {size.height} pixels × {steps} steps are {work:.0f} megapixel-steps, "
        f"at most {most:g} are taken; ask for fewer images, fewer steps or a smaller size"
    )
    raise InputError([FieldError(("body", field), message, "less_than_equal", {"le": most})])


class InputPart(BaseModel):
    """An object in a request: unknown fields are ignored, null means absent, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {name: value for name, value in data.items() if value is not None}


class EndpointInput(InputPart):
    """The base of every endpoint's Input."""

    def check(self, limits: Limits) -> None:
        """Raise InputError for what the schema allows and this server does not make."""

    def check_work(self, size: ImageSize, limits: Limits) -> None:
        """As `check`, once the size of the pictures is known: at the latest when a start picture is there."""


class LoraWeight(InputPart):
    """One LoRA and how strongly it acts: 0 is off, 1 as it was trained."""

    path: LoraPath
    scale: float = Field(1, ge=0, le=4)


class File(BaseModel):
    """A file in an answer."""

    url: str = Field(description="Where the file is, or the file itself as a data URI.")
    content_type: str
    file_name: str
    file_size: int = Field(description="Bytes.")


class PictureFile(File):
    """A picture in an answer, with all that is known of its file."""

    width: int
    height: int


class Image(BaseModel):
    """A picture in an answer, in the short form."""

    url: str = Field(description="Where the picture is, or the picture itself as a data URI.")
    width: int
    height: int
    content_type: str = "image/jpeg"

    @classmethod
    def of(cls, picture: PictureFile) -> Self:
        return cls(
            url=picture.url,
            width=picture.width,
            height=picture.height,
            content_type=picture.content_type,
        )
