"""Files made to harm who reads safetensors, each with a part of the sentence that refuses it."""

import json
import pickle
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import Any

MB = 1 << 20


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def packed(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def zipped() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": 1}))
    return buffer.getvalue()


GOOD = entry([2], 0, 8)
ENTRY = json.dumps(GOOD).encode()

REFUSED = {
    "an empty file": (b"", "only 0 bytes"),
    "a short file": (b"\x02", "only 1 bytes"),
    "a web page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "a web page"),
    "a pickle": (pickle.dumps({"weight": [1.0] * 100}), "a pickle"),
    "a zip, as torch.save writes": (zipped(), "a zip archive"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
    "JSON": (b'{"error": "Repository not found"}', "JSON text"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
    "noise": (b"\x07" * 100, "header claims"),
    "a huge header length": ((1 << 63).to_bytes(8, "little") + b"{}", "header claims"),
    "a header beyond the end": ((50).to_bytes(8, "little") + b"{}" * 10, "cut off"),
    "data that is cut off": (packed({"a": GOOD}, bytes(7)), "cut off: a ends at byte 8 of 7"),
    "bytes left over": (packed({"a": GOOD}, bytes(9)), "1 bytes after its last tensor"),
    "no tensors": (packed({}), "no tensors"),
    "only metadata": (packed({"__metadata__": {"a": "b"}}), "no tensors"),
    "overlapping tensors": (packed({"a": GOOD, "b": entry([2], 4, 12)}, bytes(12)), "b overlaps"),
    "one place for two tensors": (packed({"a": GOOD, "b": GOOD}, bytes(8)), "b overlaps"),
    "a gap": (packed({"a": GOOD, "b": entry([2], 12, 20)}, bytes(20)), "b leaves a gap"),
    "a gap at the start": (packed({"a": entry([2], 4, 12)}, bytes(12)), "a leaves a gap"),
    "an offset out of range": (packed({"a": entry([2], 800, 808)}, bytes(8)), "cut off"),
    "a negative offset": (packed({"a": entry([2], -8, 0)}, bytes(8)), "a overlaps"),
    "an end before its beginning": (packed({"a": entry([2], 8, 0)}, bytes(8)), "needs 8 bytes, not -8"),
    "an offset past 64 bits": (packed({"a": entry([2], 0, 1 << 70)}, bytes(8)), "needs 8 bytes"),
    "a shape that its bytes do not hold": (packed({"a": entry([3], 0, 8)}, bytes(8)), "needs 12 bytes"),
    "a negative side": (packed({"a": entry([-1, -2], 0, 8)}, bytes(8)), r"shape \[-1, -2\]"),
    "a side of zero": (packed({"a": entry([0, 2], 0, 0)}, b""), r"shape \[0, 2\]"),
    "a side past the limit": (packed({"a": entry([MB + 1], 0, 8)}, bytes(8)), "1 to 1048576"),
    "sides that overflow 64 bits": (packed({"a": entry([MB] * 5, 0, 8)}, bytes(8)), "needs 50706"),
    "a side past 64 bits": (packed({"a": entry([1 << 70], 0, 8)}, bytes(8)), "shape"),
    "a side of 350 digits": (packed(b'{"a":' + ENTRY.replace(b"[2]", b"[" + b"9" * 350 + b"]") + b"}"), "a"),
    "six axes": (packed({"a": entry([1, 1, 1, 1, 1, 2], 0, 8)}, bytes(8)), "at most 5 axes"),
    "a fraction for a side": (packed({"a": entry([2.0], 0, 8)}, bytes(8)), "malformed at a"),
    "true for a side": (packed({"a": entry([True, 2], 0, 8)}, bytes(8)), "malformed at a"),
    "NaN for an offset": (packed({"a": entry([2], float("nan"), 8)}, bytes(8)), "malformed at a"),
    "three offsets": (packed({"a": GOOD | {"data_offsets": [0, 4, 8]}}, bytes(8)), "malformed at a"),
    "a field too many": (packed({"a": GOOD | {"more": 1}}, bytes(8)), "malformed at a"),
    "a field too few": (packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "malformed at a"),
    "a field twice": (packed(b'{"a":' + ENTRY[:-1] + b',"shape":[2]}}', bytes(8)), "malformed"),
    "a key twice": (packed(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", bytes(8)), "the key a twice"),
    "metadata twice": (packed(b'{"__metadata__":{},"__metadata__":{}}'), "the key __metadata__ twice"),
    "metadata that is nested": (packed({"__metadata__": {"a": {}}, "b": GOOD}, bytes(8)), "malformed"),
    "metadata with a bad escape": (packed(b'{"__metadata__":{"a":"\\q"}}'), "malformed at __metadata__"),
    "metadata without end": (packed({"__metadata__": dict.fromkeys(map(str, range(1001)), "")}), "1000 keys"),
    "eight-bit floats": (packed({"a": entry([8], 0, 8, "F8_E4M3")}, bytes(8)), "stored as F8_E4M3; accepted"),
    "integers": (packed({"a": entry([1], 0, 8, "I64")}, bytes(8)), "stored as I64; accepted"),
    "a dtype of its own": (packed({"a": entry([1], 0, 8, "F33")}, bytes(8)), "stored as F33; accepted"),
    "a number for a dtype": (packed({"a": entry([1], 0, 8, 4)}, bytes(8)), "malformed at a"),
    "a list for a header": (packed(b"[1, 2]"), "malformed at byte 8"),
    "text after the header": (packed(b'{"a":' + ENTRY + b"} x", bytes(8)), "malformed"),
    "a comma too many": (packed(b'{"a":' + ENTRY + b",}", bytes(8)), "malformed"),
    "UTF-16": (packed(json.dumps({"a": GOOD}).encode("utf-16-le"), bytes(8)), "malformed"),
    "bytes that are not UTF-8": (packed(b'{"__metadata__":{"a":"\xff"}}'), "not UTF-8"),
    "a name with a line break": (packed({"a\nb": GOOD}, bytes(8)), "plain ASCII"),
    "a name in another script": (packed(json.dumps({"é": GOOD}, ensure_ascii=False).encode()), "plain ASCII"),
    "an empty name": (packed({"": GOOD}, bytes(8)), "plain ASCII"),
    "a name of 301 letters": (packed({"a" * 301: GOOD}, bytes(8)), "plain ASCII"),
    "deep nesting": (packed(b'{"a":' + b"[" * MB), "malformed"),
    "deep nesting inside a tensor": (packed(b'{"a":{"shape":' + b"[" * MB), "malformed"),
}

# Built when used: they are as large as a header may be, and an ordinary JSON parser makes 20 times that.
LARGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a header one byte too long": (lambda: packed(b"{}" + b" " * 9_999_999), "claims 10000001 bytes"),
    "20,001 tensors": (lambda: packed(b"{" + b",".join(map(member, range(20_001))) + b"}"), "20000 tensors"),
    "a million tensors": (lambda: packed(b"{" + b",".join(map(member, range(1_000_000)))), "header claims"),
    "millions of empty lists": (lambda: packed(b'{"a":{"shape":[' + b"[]," * 3_300_000), "malformed"),
    "millions of numbers": (lambda: packed(b'{"a":{"shape":[' + b"300," * 2_400_000 + b"1]}}"), "malformed"),
    "millions of notes": (lambda: packed(b'{"__metadata__":{' + b'"a":"",' * 1_400_000), "1000 keys"),
    "a long note": (lambda: packed(b'{"__metadata__":{"a":"' + b'\\"' * 4_900_000 + b'"}}'), "no tensors"),
    "a string without end": (lambda: packed(b'{"' + b"a" * 9_900_000), "malformed"),
    "spaces without end": (lambda: packed(b"{" + b" " * 9_900_000), "malformed"),
    "wide characters": (
        lambda: packed(('{"__metadata__":{"a":"' + "😀" * 2_400_000 + '"}}').encode()),
        "no tensors",
    ),
}


def member(number: int) -> bytes:
    return b'"t%d":{"dtype":"F32","shape":[],"data_offsets":[%d,%d]}' % (number, 4 * number, 4 * number + 4)
