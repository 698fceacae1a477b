"""How forwards run."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.settings.base import Settings


class PictureSize(Settings):
    """Pixels."""

    width: int = Field(ge=64, le=4096)
    height: int = Field(ge=64, le=4096)


class SpeedSettings(Settings):
    """How the forwards run. But for `quantisation` and `acceleration`, pictures change by rounding only."""

    compile: Literal["none", "regional"] = Field(
        "none", description="regional: torch.compile of the repeated blocks; LoRA banks take twice the memory"
    )
    graphs: Literal["none", "auto"] = Field(
        "none",
        description="auto, beside compiled blocks on a GPU: forwards of `sizes` and `rows` are captured as "
        "CUDA graphs where that is measured to be faster",
    )
    sizes: tuple[PictureSize, ...] = Field(
        (PictureSize(width=1024, height=1024),),
        description="pictures whose forwards are made ready at the start; others are compiled as well, but "
        "never captured",
    )
    rows: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 2, 3, 4), description="rows of a forward that are made ready, as far as batch_tokens goes"
    )
    attention: Literal["sdpa", "auto"] = Field(
        "sdpa",
        description="sdpa: torch's own order of its kernels; auto: on a GPU the fastest by measurement at "
        "the start comes first",
    )
    channels_last: bool = Field(False, description="the memory format of convolutions")
    compile_vae: bool = Field(False, description="torch.compile of the VAE's decoder")
    quantisation: Literal["none", "fp8"] = Field(
        "none",
        description="fp8: the layers of FLUX's blocks multiply in float8; needs dtype bfloat16 and hardware "
        "for it",
    )
    acceleration: Literal["none", "regular", "high"] = Field(
        "none",
        description="of FLUX's text-to-image and image-to-image: a step whose first block changes its input "
        "much like at the last whole step reuses the other blocks' share of that one; high: more often",
    )
    cache: str = Field(
        "~/.cache/darkroom/compiled", description="a folder on a local disk for what has been compiled"
    )

    @property
    def compiles(self) -> bool:
        return self.compile != "none" or self.compile_vae

    @model_validator(mode="after")
    def _graphs_of_compiled_blocks(self) -> "SpeedSettings":
        if self.graphs != "none" and self.compile == "none":
            raise ValueError("speed.graphs: auto needs compile: regional")
        return self
