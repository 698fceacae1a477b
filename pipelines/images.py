"""Pictures ↔ tensors and bytes."""

from io import BytesIO
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

Format = Literal["jpeg", "png"]


def from_tensor(pixels: Tensor) -> Image.Image:
    """[3, height, width] in [-1, 1], clamped → an RGB picture."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    array = scaled.round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array)


def encode(picture: Image.Image, format: Format) -> bytes:
    """JPEG at quality 95 or PNG at compression level 1, as fal.ai's own toolkit does."""
    buffer = BytesIO()
    if format == "jpeg":
        picture.save(buffer, "JPEG", quality=95)
    else:
        picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def content_type(format: Format) -> str:
    return f"image/{format}"


def blackened(picture: Image.Image) -> Image.Image:
    """Black, of the same size."""
    return Image.new("RGB", picture.size)
