"""What all settings share."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

MAX_IMAGE_BYTES = 50 * 2**20  # what fal.ai's own toolkit downloads at most
FILES_URL = "file://~/.local/share/darkroom/files"


class Settings(BaseModel):
    """The base of all settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(Settings):
    """What one request may ask for beyond what its schema says."""

    max_pixels: int = Field(2048 * 2048, gt=0, description="width × height of one picture")
    max_megapixel_steps: float = Field(
        2500, gt=0, description="width × height in millions, times images, times steps, of one request"
    )


class ReachSettings(Settings):
    """Which hosts may be asked for by a URL in a request."""

    allowed_networks: tuple[str, ...] = Field(
        (), description="CIDR ranges that may be reached besides the public internet, such as 10.0.0.0/8"
    )
    allowed_ports: tuple[int, ...] = Field((80, 443), description="none: any port")
    connect_timeout_s: float = Field(10, gt=0)


def local_path(url: str, scheme: str) -> Path | None:
    """The path in a `scheme://` URL with ~ expanded, or None when the URL has another scheme."""
    prefix = f"{scheme}://"
    return Path(url.removeprefix(prefix)).expanduser().absolute() if url.startswith(prefix) else None
