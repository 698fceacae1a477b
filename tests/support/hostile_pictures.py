"""Picture files made to harm who decodes them, or that few programs make. Each is built when asked for."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

SIDE = 40


def scene(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A picture with no symmetry."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([columns, rows, (columns + rows) / 2], 2).astype(np.uint8))


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def many_frames(format: str, count: int) -> bytes:
    frames = [Image.new("RGB", (32, 32), (each % 256, each // 256, 9)) for each in range(count)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


# -- PNG


def png(width: int, height: int, *chunks: bytes, depth: int = 8, kind: int = 2, data: bytes = b"") -> bytes:
    """A PNG that says what it likes; `chunks` come before the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", data or zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def rows(width: int, height: int) -> bytes:
    """The pixels of a black RGB picture, compressed as far as zlib does."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    return b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()


def zeros(megabytes: int) -> bytes:
    squeeze = zlib.compressobj(9)
    return b"".join(squeeze.compress(bytes(2**20)) for _ in range(megabytes)) + squeeze.flush()


def idat_bomb() -> bytes:
    """Far more pixels than the header says."""
    return png(8, 8, data=zeros(300))


# -- JPEG


def jpeg(**options: Any) -> bytes:
    return encoded(scene(), "JPEG", quality=90, **options)


def sized(width: int, height: int) -> bytes:
    """A JPEG whose frame header says another size."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans(count: int, width: int = 4000, height: int = 4000) -> bytes:
    """A progressive JPEG that refines the same coefficients again and again."""
    data = bytearray(encoded(Image.new("L", (8, 8)), "JPEG", progressive=True))
    at = data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    last = data.rindex(b"\xff\xda")
    scan = bytes(data[last:-2])
    return bytes(data[:last]) + scan * count + b"\xff\xd9"


def with_lines() -> bytes:
    """A JPEG of height 0 that tells its height after the scan, by DNL."""
    return sized(SIDE, 0)[:-2] + b"\xff\xdc\x00\x04" + struct.pack(">H", SIDE) + b"\xff\xd9"


def segment(marker: int, data: bytes) -> bytes:
    """Put behind the start of a JPEG."""
    made = jpeg()
    return made[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + made[2:]


def exif(*entries: bytes, following: int = 0) -> bytes:
    """A TIFF directory as EXIF has it, little-endian."""
    return (
        b"Exif\0\0II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + b"".join(entries)
        + struct.pack("<I", following)
    )


def orientation(value: int) -> bytes:
    return struct.pack("<HHIHH", 0x0112, 3, 1, value, 0)


def turned(value: int, format: str = "JPEG") -> bytes:
    """A picture whose EXIF says how to hold it."""
    marks = Image.Exif()
    marks[0x0112] = value
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    if format == "WEBP":
        options = {"lossless": True}
    return encoded(scene(48, 32), format, exif=marks, **options)


# -- WebP


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    return b"VP8X", bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(
        3, "little"
    )


def lossless(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(20)


# -- others, none of which the server reads


def tiff_loop() -> bytes:
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + orientation(1) + struct.pack("<I", 8)


def ico(inner: bytes) -> bytes:
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


def box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data) + 8) + kind + data


OTHERS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "one byte": lambda: b"\x89",
    "GIF": lambda: encoded(scene(), "GIF"),
    "GIF of 2000 frames": lambda: many_frames("GIF", 2000),
    "GIF of 65535 x 65535": lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0\0;",
    "BMP": lambda: encoded(scene(), "BMP"),
    "TIFF": lambda: encoded(scene(), "TIFF"),
    "TIFF whose directory leads to itself": tiff_loop,
    "ICO in ICO": lambda: ico(ico(ico(encoded(scene(), "PNG")))),
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\nshowpage\n%%EOF\n",
    "PDF": lambda: b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    "PSD": lambda: b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 30_000, 30_000, 8, 3) + bytes(50),
    "FITS": lambda: b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
    "HEIF": lambda: box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(b"meta", bytes(30)),
    "AVIF": lambda: box(b"ftyp", b"avif\0\0\0\0mif1avif") + box(b"meta", bytes(30)),
    "JPEG 2000": lambda: box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 "),
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "HTML": lambda: b"<!doctype html><html><script>alert(1)</script></html>",
    "PPM": lambda: b"P6 60000 60000 255 " + bytes(30),
    "XPM": lambda: b'/* XPM */\nstatic char *x[] = {"1 1 1 1", "a c #000000", "a"};',
    "zip": lambda: b"PK\x03\x04" + bytes(60),
    "pickle": lambda: b"\x80\x04K\x01.",
    "zeros": lambda: bytes(10**6),
    "GIF and JavaScript": lambda: b"GIF89a=1;alert(document.domain)//",
    "AVI, RIFF as well": lambda: b"RIFF\x20\0\0\0AVI LIST" + bytes(40),
}

# What begins as a picture that the server reads, and is refused
REFUSED: dict[str, Callable[[], bytes]] = {
    "PNG of 50,000 x 50,000": lambda: png(50_000, 50_000),
    "PNG of 2^31 - 1 pixels a side": lambda: png(2**31 - 1, 2**31 - 1),
    "PNG of 2^31 pixels a side": lambda: png(2**31, 2**31),
    "PNG one row past the bound": lambda: png(8192, 8193, data=rows(8192, 8)),
    "PNG of no columns": lambda: png(0, 9),
    "PNG of no rows": lambda: png(9, 0),
    "PNG without pixels": lambda: png(9, 9),
    "PNG without an end": lambda: encoded(scene(), "PNG")[:-30],
    "PNG of a depth that is none": lambda: png(9, 9, depth=7),
    "PNG of a colour type that is none": lambda: png(9, 9, kind=5),
    "PNG with a wrong sum": lambda: encoded(scene(), "PNG").replace(b"IDATx", b"IDATy"),
    "PNG with a chunk past its end": lambda: png(9, 9)[:33] + b"\x7f\xff\xff\xffzTXtabc",
    "PNG with a note of 100 MB": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros(100)), data=rows(8, 8)),
    "PNG with many notes of 1 MB": lambda: png(
        8, 8, *[chunk(b"zTXt", b"a%d\0\0" % each + zeros(1)[:-9]) for each in range(200)], data=rows(8, 8)
    ),
    "PNG with a profile of 100 MB": lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zeros(100)), data=rows(8, 8)),
    "JPEG of no rows, told later": with_lines,
    "JPEG of no columns": lambda: sized(0, SIDE),
    "JPEG of 65,535 x 65,535": lambda: sized(65_535, 65_535),
    "JPEG of its first half": lambda: jpeg()[: len(jpeg()) // 2],
    "JPEG of two bytes": lambda: b"\xff\xd8",
    "JPEG of three bytes": lambda: b"\xff\xd8\xff",
    "JPEG of markers only": lambda: b"\xff\xd8" + b"\xff\xe1\x00\x02" * 100_000,
    "WebP of the widest canvas": lambda: webp(canvas(2**24, 2**24), lossless(9, 9)),
    "WebP of 16,384 x 16,384": lambda: webp(lossless(16_384, 16_384)),
    "WebP of a canvas that its picture does not fill": lambda: webp(canvas(8000, 8000), lossless(9, 9)),
    "WebP that is cut off": lambda: encoded(scene(), "WEBP", lossless=True)[:-40],
    "WebP without a picture": lambda: webp(canvas(9, 9)),
    "WebP that lies about its length": lambda: encoded(scene(), "WEBP").replace(b"VP8 ", b"VP9 "),
}

# What costs most, and may be refused or not
EITHER: dict[str, Callable[[], bytes]] = {
    "PNG at the bound": lambda: png(8192, 8192, data=rows(8192, 8192)),
    "PNG with more pixels than it says": idat_bomb,
    "PNG of 1 x 100,000": lambda: encoded(Image.new("RGB", (1, 100_000)), "PNG"),
    "PNG of 100,000 x 1": lambda: encoded(Image.new("RGB", (100_000, 1)), "PNG"),
    "JPEG of far more rows than it has": lambda: sized(SIDE, 8000),
    "JPEG of many scans": lambda: many_scans(2000),
    "JPEG of many scans at the bound": lambda: many_scans(300, 8192, 8191),
    "WebP of 2000 frames": lambda: many_frames("WEBP", 2000),
    "PNG of 2000 frames": lambda: many_frames("PNG", 2000),
    "PNG that says it has 2^31 frames": lambda: png(
        8, 8, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), data=rows(8, 8)
    ),
    "JPEG with a directory that leads to itself": lambda: segment(0xE1, exif(orientation(1), following=8)),
    "JPEG with a value of 4 GB": lambda: segment(0xE1, exif(struct.pack("<HHII", 0x0112, 3, 2**32 - 1, 8))),
    "JPEG with an orientation of text": lambda: segment(
        0xE1, exif(struct.pack("<HHI4s", 0x0112, 2, 4, b"ab\0\0"))
    ),
    "JPEG with EXIF of noise": lambda: segment(0xE1, b"Exif\0\0" + bytes(range(256)) * 9),
    "JPEG of several pictures that are not there": lambda: segment(
        0xE2, b"MPF\0II*\0\x08\0\0\0" + b"\xff" * 60
    ),
    "JPEG with a broken XMP": lambda: segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<x" * 9000),
    "JPEG with a profile of parts that lack": lambda: segment(0xE2, b"ICC_PROFILE\0\xff\xff" + bytes(50)),
}


def cut_short() -> Iterator[tuple[str, bytes]]:
    """Each kind, cut off at many places."""
    for format in ("PNG", "JPEG", "WEBP"):
        data = encoded(scene(), format)
        for part in range(1, 19):  # nearer to its end, a PNG may lack no pixel
            yield f"{format} {part}/20", data[: len(data) * part // 20]


def polyglots() -> Iterator[tuple[str, bytes]]:
    """Pictures that something else may take for its own: only the pixels come through."""
    tail = b"<script>alert(1)</script>"
    yield "PNG then zip", encoded(scene(), "PNG") + b"PK\x05\x06" + bytes(18)
    yield "PNG then HTML", encoded(scene(), "PNG") + tail
    yield "JPEG then HTML", jpeg() + tail
    yield "JPEG with PHP inside", segment(0xFE, b"<?php system($_GET[0]);?>")
    yield "WebP then HTML", encoded(scene(), "WEBP") + tail


def modes() -> Iterator[tuple[str, bytes]]:
    """Left half black, right half white."""
    half = Image.new("L", (8, 4))
    half.paste(255, (4, 0, 8, 4))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"PNG {mode}", encoded(half.convert(mode), "PNG")
    deep = Image.fromarray(np.asarray(half).astype(np.uint16) * 257)
    yield "PNG of 16 bits", encoded(deep, "PNG")
    triple = np.repeat(np.asarray(half)[:, :, None].astype(">u2") * 257, 3, 2)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in triple))
    yield "PNG of 3 x 16 bits", png(8, 4, depth=16, data=data)
    clear = half.convert("P")
    yield "PNG of a palette, some of it clear", encoded(clear, "PNG", transparency=b"\0\xff" * 8)
    for mode in ("L", "RGB", "CMYK"):
        yield f"JPEG {mode}", encoded(half.convert("RGB").convert(mode), "JPEG", quality=100)
    yield "JPEG, progressive", encoded(half, "JPEG", quality=100, progressive=True)
    for mode in ("RGB", "RGBA"):
        yield f"WebP {mode}", encoded(half.convert(mode), "WEBP", lossless=True)
