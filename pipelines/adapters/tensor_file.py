"""Files of tensors that come from outside: safetensors only, checked here before any library opens them.

A safetensors file is 8 bytes of header length (little endian), a JSON header, and the tensors' bytes:
https://github.com/huggingface/safetensors#format. Nothing in it is code, but its header is a stranger's,
so we walk it ourselves, in memory no larger than the header, and accept the plain form only.
"""

import codecs
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from schemas.errors import AssetError

INVALID_WEIGHTS = "invalid_weights"


@dataclass(frozen=True, slots=True)
class TensorLimits:
    """What a file may ask for."""

    header_bytes: int = 10_000_000
    tensors: int = 20_000
    axes: int = 5
    side: int = 1 << 20  # the longest axis
    notes: int = 1000
    note_bytes: int = 1 << 18  # longer notes, such as lists of training tags, are not kept
    dtypes: tuple[str, ...] = ("F64", "F32", "F16", "BF16")
    empty: bool = False  # whether a side may be 0, as in tensors that only mark a file


LIMITS = TensorLimits()


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file whose header is in order: each tensor's shape, and the notes (`__metadata__`) beside them."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    notes: Mapping[str, str]

    @property
    def numel(self) -> int:
        """How many numbers all tensors have together."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def load(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Copies of the named tensors, or of all, on the CPU, in the file's dtypes.

        The file may go away afterwards.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                return {
                    name: file.get_tensor(name).clone() for name in (self.shapes if names is None else names)
                }
        except SafetensorError as error:
            raise invalid(f"The file is not a valid safetensors file: {error}.") from error


def read(path: Path, *, limits: TensorLimits = LIMITS) -> TensorFile:
    """Check the file by its content, whatever its name; its tensors are read by `load` only.

    Raises AssetError ("invalid_weights") with a sentence about what is wrong.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = _read_header(file, size, limits)
    entries, notes = _parse(header, limits)
    _check_layout(entries, data_bytes=size - 8 - len(header))
    return TensorFile(path, {name: entry.shape for name, entry in entries.items()}, notes)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise AssetError naming the tensors that hold NaN or an infinity."""
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        raise invalid(f"The file holds values that are not finite numbers, in {listed(bad)}.")


def _is_finite(tensor: Tensor) -> bool:
    """By the extremes, which NaN goes into as well: a third of the work of looking at each value."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def invalid(message: str) -> AssetError:
    """The refusal of a file of weights."""
    return AssetError(message, INVALID_WEIGHTS)


def listed(names: Collection[str], most: int = 5) -> str:
    """The first few names in a row: "a, b and 3 more"."""
    first = ", ".join(list(names)[:most])
    return f"{first} and {len(names) - most} more" if len(names) > most else first


# How files of other kinds begin. A safetensors file begins with a small number, so its 8th byte is 0.
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive, such as PyTorch's .pt, .bin and .ckpt files are",
    b"\x80": "a pickle, such as older .pt, .bin and .ckpt files are",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a Git LFS pointer to a file, not the file itself",
    b"<": "a web page",
    b"{": "JSON text",
}


def _read_header(file: BinaryIO, size: int, limits: TensorLimits) -> bytes:
    start = file.read(32)
    length = int.from_bytes(start[:8], "little")
    if size < 10 or length > limits.header_bytes:
        for magic, kind in _OTHER_KINDS.items():
            if start.startswith(magic):
                raise invalid(f"The file is {kind}; only safetensors files are accepted.")
        raise invalid(
            "The file is not a safetensors file: "
            + (f"it has only {size} bytes." if size < 10 else f"its header claims {length} bytes.")
        )
    if length > size - 8:
        raise invalid(f"The file is cut off: its header needs {8 + length} bytes, the file has {size}.")
    file.seek(8)
    return file.read(length)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor in the header; its bytes run from `begin` to `end`, counted after the header."""

    shape: tuple[int, ...]
    begin: int
    end: int


_SPACE = rb"[ \t\r\n]*+"
_OPEN = re.compile(rb"\{" + _SPACE)
_CLOSE = re.compile(_SPACE + rb"\}")
_COMMA = re.compile(_SPACE + rb"," + _SPACE)
_COLON = re.compile(_SPACE + rb":" + _SPACE)
_STRING = re.compile(rb'"(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+"')
_ENTRY = re.compile(rb"\{[^{}\[\]]*+(?:\[[^{}\[\]]*+\][^{}\[\]]*+){0,2}\}")  # flat, but for two arrays
_END = re.compile(_SPACE + rb"\Z")
_TENSOR_NAME = re.compile(rb'"[ !#-\[\]-~]{1,300}"')  # ASCII without quote and backslash
_ENTRY_BYTES = 400

_BYTES_EACH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}


class _Scanner:
    """A walk through the header, piece by piece."""

    def __init__(self, header: bytes) -> None:
        self._header = header
        self._at = 0

    def take(self, pattern: re.Pattern[bytes]) -> bytes | None:
        match = pattern.match(self._header, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match[0]

    def expect(self, pattern: re.Pattern[bytes]) -> bytes:
        piece = self.take(pattern)
        if piece is None:
            raise invalid(f"The header of the safetensors file is malformed at byte {8 + self._at}.")
        return piece

    def members(self) -> Iterator[bytes]:
        """The names in an object, quoted; take each one's value before asking for the next."""
        self.expect(_OPEN)
        if self.take(_CLOSE):
            return
        while True:
            name = self.expect(_STRING)
            self.expect(_COLON)
            yield name
            if self.take(_CLOSE):
                return
            self.expect(_COMMA)


def _parse(header: bytes, limits: TensorLimits) -> tuple[dict[str, _Entry], dict[str, str]]:
    _check_utf8(header)
    scanner = _Scanner(header)
    entries: dict[str, _Entry] = {}
    notes: dict[str, str] | None = None
    for quoted in scanner.members():
        if not _TENSOR_NAME.fullmatch(quoted):
            raise invalid("A tensor's name in the file is not 1 to 300 plain ASCII characters.")
        name = quoted[1:-1].decode()
        if name in entries or (name == "__metadata__" and notes is not None):
            raise invalid(f"The header of the safetensors file has the key {name} twice.")
        if name == "__metadata__":
            notes = _notes(scanner, limits)
        elif len(entries) == limits.tensors:
            raise invalid(f"The file holds more than {limits.tensors} tensors.")
        else:
            entries[name] = _entry(name, scanner.expect(_ENTRY), limits)
    scanner.expect(_END)
    if not entries:
        raise invalid("The file holds no tensors.")
    return entries, notes or {}


def _check_utf8(header: bytes, piece_bytes: int = 1 << 20) -> None:
    pieces = (header[at : at + piece_bytes] for at in range(0, len(header), piece_bytes))
    try:
        for _ in codecs.iterdecode(pieces, "utf-8"):
            pass
    except UnicodeDecodeError as error:
        raise invalid("The header of the safetensors file is not UTF-8 text.") from error


def _notes(scanner: _Scanner, limits: TensorLimits) -> dict[str, str]:
    notes: dict[str, str] = {}
    for count, name in enumerate(scanner.members()):
        if count == limits.notes:
            raise invalid(f"The file's metadata has more than {limits.notes} keys.")
        note = scanner.expect(_STRING)
        if len(name) + len(note) <= limits.note_bytes:
            notes[_json(name)] = _json(note)
    return notes


def _json(text: bytes) -> str:
    try:
        value: str = json.loads(text.decode())
    except ValueError as error:
        raise invalid("The header of the safetensors file is malformed at __metadata__.") from error
    return value


def _entry(name: str, text: bytes, limits: TensorLimits) -> _Entry:
    shape, dtype, begin, end = _fields(name, text)
    if dtype not in limits.dtypes:
        raise invalid(f"{name} is stored as {dtype}; accepted are {', '.join(limits.dtypes)}.")
    least = 0 if limits.empty else 1
    if len(shape) > limits.axes or not all(least <= side <= limits.side for side in shape):
        raise invalid(
            f"{name} has the shape {list(shape)}; at most {limits.axes} axes of {least} to {limits.side} fit."
        )
    needed = math.prod(shape) * _BYTES_EACH[dtype]
    if end - begin != needed:
        raise invalid(f"{name} of shape {list(shape)} in {dtype} needs {needed} bytes, not {end - begin}.")
    return _Entry(shape, begin, end)


def _fields(name: str, text: bytes) -> tuple[tuple[int, ...], str, int, int]:
    malformed = invalid(f"The header of the safetensors file is malformed at {name}.")
    if len(text) > _ENTRY_BYTES:
        raise malformed
    try:
        pairs: list[tuple[str, object]] = json.loads(text.decode(), object_pairs_hook=list)
    except ValueError as error:
        raise malformed from error
    match sorted(pairs, key=lambda pair: pair[0]):
        case [("data_offsets", [begin, end]), ("dtype", str(dtype)), ("shape", [*shape])]:
            numbers = [
                number for number in (begin, end, *shape) if type(number) is int
            ]  # true is no int here
            if len(numbers) == 2 + len(shape):
                return tuple(numbers[2:]), dtype, numbers[0], numbers[1]
    raise malformed


def _check_layout(entries: Mapping[str, _Entry], data_bytes: int) -> None:
    """The tensors follow one another without gap or overlap and fill the file to its end."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > data_bytes:
            raise invalid(f"The file is cut off: {name} ends at byte {entry.end} of {data_bytes}.")
        if entry.begin != at:
            raise invalid(f"{name} {'overlaps' if entry.begin < at else 'leaves a gap after'} other bytes.")
        at = entry.end
    if at != data_bytes:
        raise invalid(f"The file has {data_bytes - at} bytes after its last tensor.")
