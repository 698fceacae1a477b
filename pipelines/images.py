"""Pictures ↔ tensors and bytes."""

from io import BytesIO
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from schemas.errors import NotFinite

Format = Literal["jpeg", "png"]


def from_tensor(pixels: Tensor) -> Image.Image:
    """[3, height, width] in [-1, 1], clamped → an RGB picture. Raises NotFinite: NaN would be black."""
    if not torch.isfinite(pixels).all():
        raise NotFinite
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


def fill(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to cover width × height and cropped around the middle (Lanczos)."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture → [3, height, width] in [-1, 1], float32."""
    array = torch.from_numpy(np.asarray(picture).copy())
    return array.permute(2, 0, 1).float() / 127.5 - 1


def mask(picture: Image.Image, columns: int, rows: int, threshold: float) -> Tensor:
    """Where a grey picture is at least `threshold` (0 … 1), averaged over cells: [rows, columns] of 0 and 1.

    Cropped as `fill` crops a picture of the same size.
    """
    cells = ImageOps.fit(picture.convert("L"), (columns, rows), Image.Resampling.BOX)
    return (torch.from_numpy(np.asarray(cells).copy()) >= threshold * 255).float()
