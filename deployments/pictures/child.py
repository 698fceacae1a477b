"""Pictures from strangers become pixels here, in a process of its own that may do little else.

It is run by `deployments.pictures.decoders`, over a socket as its standard input. A job is 8 bytes of
length and a file; the answer is 8 bytes of length, a JSON head, and, if the head has a size, the pixels,
three bytes each, row by row. Numbers are big-endian. It imports Pillow and nothing of the server, may write
no file, and has bounds on its memory and its time: what a picture does to it, it does to nobody else.
"""

import json
import math
import os
import resource
import select
import threading
import zlib
from collections.abc import Iterator, Mapping
from io import BytesIO
from struct import error as StructError
from typing import Any, BinaryIO

# with all that they would import later
from PIL import Image, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL import UnidentifiedImageError as Unidentified
from PIL.Image import Transpose

FORMATS = ("PNG", "JPEG", "WEBP")
PLUGINS = (PngImagePlugin, JpegImagePlugin, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin)
MAX_PIXELS = 64 * 2**20  # of a picture in a request; less than where Pillow's own warning begins
MEMORY_BYTES = 576 * 2**20  # the whole address space; 40 MiB of it before the first picture
CPU_S = 4  # for a picture; it is counted in whole seconds, so one more may be had
OPEN_FILES = 16
BAND_BYTES = 2**20  # of pixels that are made and sent at once

_JOB = 0  # standard input, a socket


def main() -> None:
    """Answer jobs, one after the other, until the other end is closed."""
    Image.preinit()
    _confine()
    threading.stack_size(2**18)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    with open(_JOB, "rb", closefd=False) as jobs, open(_JOB, "wb", closefd=False) as answers:
        while head := jobs.read(8):
            data = jobs.read(int.from_bytes(head))
            _grant(CPU_S)
            _answer(data, answers)
            answers.flush()


def _confine() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


def _grant(seconds: int) -> None:
    """So much time from now on; who takes more is ended by the kernel."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = math.ceil(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, resource.RLIM_INFINITY))


def _end_with_the_server() -> None:
    """Wait in a thread for the other end to close, however busy the main one is."""
    poll = select.poll()
    poll.register(_JOB, 0)  # a hang-up is always told
    poll.poll()
    os._exit(0)


def _answer(data: bytes, answers: BinaryIO) -> None:
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            _check_size(picture)
            picture.load()
            way = picture.getexif().get(0x0112)
            _say(answers, {"size": _turned(picture.size, way)})
            for band in _bands(picture, way):
                answers.write(band)
    except Unidentified:
        message = "The file is not a picture that this server reads; send PNG, JPEG or WebP."
        formats = [each.lower() for each in FORMATS]
        _refuse(answers, message, "unsupported_image_format", {"supported_formats": formats})
    except (_TooLarge, Image.DecompressionBombError):
        side = math.isqrt(MAX_PIXELS)
        message = f"The picture must have at most {MAX_PIXELS} pixels, such as {side} × {side}."
        _refuse(answers, message, "image_too_large", {"max_width": side, "max_height": side})
    except MemoryError:
        _refuse(answers, "The picture takes more memory than there is for it; send a smaller one.")
    except (*_BROKEN, zlib.error, StructError) as error:
        _refuse(answers, f"The picture is broken: {error}")


# What Pillow raises for files that are not in order. What it should not raise ends the process.
_BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError) + (
    SyntaxError,
    TypeError,
    ValueError,
)


class _TooLarge(Exception):
    pass


def _check_size(picture: Image.Image) -> None:
    """Before a pixel is decoded."""
    if picture.width * picture.height > MAX_PIXELS:
        raise _TooLarge
    if picture.width < 1 or picture.height < 1:
        raise ValueError("it has no pixels")


def _say(answers: BinaryIO, head: Mapping[str, Any]) -> None:
    text = json.dumps(head).encode()
    answers.write(len(text).to_bytes(8) + text)


def _refuse(
    answers: BinaryIO, message: str, kind: str = "image_load_error", ctx: Mapping[str, Any] | None = None
) -> None:
    _say(answers, {"message": message, "kind": kind, "ctx": ctx})


# How a camera's picture is set upright, by its EXIF orientation
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def _turned(size: tuple[int, int], way: Any) -> tuple[int, int]:
    return (size[1], size[0]) if way in (5, 6, 7, 8) else size


def _bands(picture: Image.Image, way: Any) -> Iterator[bytes]:
    """The rows of the upright picture in RGB, some at a time: no second picture is ever in memory."""
    width, height = _turned(picture.size, way)
    rows = max(1, BAND_BYTES // (3 * width))
    for top in range(0, height, rows):
        band = picture.crop(_source(picture.size, way, top, min(height, top + rows)))
        if way in _TURNS:
            band = band.transpose(_TURNS[way])
        if band.mode == "I;16":  # which Pillow would clip at 255 of 65535
            band = Image.frombytes("L", band.size, band.tobytes()[1::2])
        yield (band if band.mode == "RGB" else band.convert("RGB")).tobytes()


def _source(size: tuple[int, int], way: Any, top: int, bottom: int) -> tuple[int, int, int, int]:
    """Where the rows `top` … `bottom` of the upright picture are in the file's."""
    width, height = size
    match way:
        case 3 | 4:
            return 0, height - bottom, width, height - top
        case 5 | 6:
            return top, 0, bottom, height
        case 7 | 8:
            return width - bottom, 0, width - top, height
        case _:
            return 0, top, width, bottom


if __name__ == "__main__":
    main()
